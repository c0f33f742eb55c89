"""Against loops over every place with a DFT by matrices, and the properties that the alignment promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.kernels import spectral_guidance
from pack.kernels.low_frequency_alignment import Statistics, align, low_pass, running_average, statistics
from pack.kernels.spectral_guidance import Band
from support.explicit_spectrum import dft, in_band, spectrum

SHAPES = [
    (1, 1, 1, 1), (1, 2, 1, 7), (2, 1, 6, 1), (2, 3, 5, 4), (1, 2, 7, 9),
    (1, 16, 16, 16),  # a theatre latent
    (2, 3, 2, 5, 4), (1, 16, 3, 12, 12),  # videos; the second is the theatre's
]
seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(2, 9)] * 2) | st.tuples(
    *[st.integers(1, 2)] * 3, *[st.integers(2, 6)] * 2
)
cutoffs = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.75])
shares = st.floats(0, 1)


def latent(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(shape[1], *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + levels).to(dtype)


def explicit_low(x, cutoff):
    height, width = x.shape[-2:]
    low_bins = spectrum(x) * in_band(height, width, Band(0, cutoff))
    return (dft(height).conj() @ low_bins @ dft(width).conj()).real


def explicit_statistics(low, weights):
    """Plain sums over the places of one sample and channel."""
    places = list(zip(low.flatten().tolist(), weights.expand(low.shape).flatten().tolist(), strict=True))
    total = sum(w for _, w in places)
    mean = sum(w * value for value, w in places) / total
    return mean, math.sqrt(sum(w * (value - mean) ** 2 for value, w in places) / total)


def explicit_alignment(x, earlier, cutoff, momentum, strength, weights):
    """The formulas of the module's text, one sample and channel at a time."""
    result = x.clone()
    for b in range(x.shape[0]):
        w = weights[b, 0]
        for c in range(x.shape[1]):
            target = None
            for samples in earlier:
                statistics = explicit_statistics(explicit_low(samples[b, c], cutoff), w)
                target = statistics if target is None else [
                    momentum * old + (1 - momentum) * new for old, new in zip(target, statistics, strict=True)
                ]
            low = explicit_low(x[b, c], cutoff)
            mean, deviation = explicit_statistics(low, w)
            scale = target[1] / deviation if deviation > 1e-12 else 1
            result[b, c] = x[b, c] + strength * w * ((low - mean) * scale + target[0] - low)
            if deviation <= 1e-12:
                result[b, c] = x[b, c] + strength * w * (target[0] - mean)
    return result


def aligned(x, earlier, cutoff, momentum=0.9, strength=1.0, weights=None):
    rounds = [statistics(low_pass(samples, cutoff), weights) for samples in earlier]
    return align(x, running_average(rounds, momentum), cutoff, strength, weights)


@pytest.mark.parametrize("cutoff", [0.0, 0.2, 0.25, 0.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_alignment_is_the_explicit_one(shape, cutoff):
    x, first, second = (latent(seed, *shape) for seed in range(3))
    places = shape[0], 1, *[1] * (len(shape) - 4), *shape[-2:]
    weights = torch.rand(places, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.01
    for w in (torch.ones_like(weights), weights):
        expected = explicit_alignment(x, [first, second], cutoff, 0.7, 0.6, w)
        torch.testing.assert_close(
            aligned(x, [first, second], cutoff, 0.7, 0.6, w), expected, rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(low_pass(x, cutoff), explicit_low(x, cutoff), rtol=1e-10, atol=1e-12)


def test_two_by_two_by_hand():
    """One channel 1, 3, 1, 3 with the first's mean 10 and deviation 2, all frequencies: 8, 12, 8, 12."""
    x = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
    first = torch.tensor([[[[8.0, 12.0], [12.0, 8.0]]]])
    expected = torch.tensor([[[[8.0, 12.0], [8.0, 12.0]]]])
    torch.testing.assert_close(aligned(x, [first], 0.75), expected)
    torch.testing.assert_close(aligned(x, [first], 0.75, strength=0.5), (x + expected) / 2)
    # At cutoff 0 the low band is the mean alone, which moves from 2 to 10.
    torch.testing.assert_close(aligned(x, [first], 0.0), x + 8)


def test_running_average_by_hand():
    rounds = [Statistics(torch.tensor([[m]]), torch.tensor([[d]])) for m, d in ((1.0, 4.0), (3.0, 8.0), (7.0, 0.0))]
    average = running_average(rounds, 0.5)
    assert average.mean.item() == 0.5 * (0.5 * 1 + 0.5 * 3) + 0.5 * 7
    assert average.deviation.item() == 0.5 * (0.5 * 4 + 0.5 * 8)
    assert running_average(rounds, 1.0) == rounds[0] and running_average(rounds, 0.0) == rounds[-1]
    with pytest.raises(ValueError, match="at least one round"):
        running_average([], 0.5)


@given(shapes, seeds, cutoffs, shares)
def test_statistics_at_full_strength_are_the_running_average(shape, seed, cutoff, momentum):
    x, *earlier = (latent(seed + i, *shape) for i in range(3))
    target = running_average([statistics(low_pass(e, cutoff)) for e in earlier], momentum)
    result = statistics(low_pass(align(x, target, cutoff, 1.0), cutoff))
    torch.testing.assert_close(result.mean, target.mean, rtol=1e-9, atol=1e-9)
    varies = statistics(low_pass(x, cutoff)).deviation > 1e-9  # a constant is not scaled
    torch.testing.assert_close(result.deviation[varies], target.deviation[varies], rtol=1e-6, atol=1e-9)


@given(shapes, seeds, cutoffs, shares)
def test_frequencies_above_the_cutoff_stay(shape, seed, cutoff, strength):
    x, first = latent(seed, *shape), latent(seed + 1, *shape)
    above = 1 - in_band(*shape[-2:], Band(0, cutoff))
    result = aligned(x, [first], cutoff, strength=strength)
    torch.testing.assert_close(spectrum(result) * above, spectrum(x) * above, rtol=1e-8, atol=1e-8)


@given(shapes, seeds, cutoffs)
def test_aligning_twice_is_aligning_once(shape, seed, cutoff):
    x, first = latent(seed, *shape), latent(seed + 1, *shape)
    once = aligned(x, [first], cutoff)
    torch.testing.assert_close(aligned(once, [first], cutoff), once, rtol=1e-7, atol=1e-7)


@given(shapes, seeds, cutoffs, shares)
def test_each_of_a_batch_is_as_if_alone(shape, seed, cutoff, strength):
    x, first = latent(seed, *shape), latent(seed + 1, *shape)
    weights = latent(seed + 2, *shape)[:, :1].abs()
    together = aligned(x, [first], cutoff, strength=strength, weights=weights)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        alone = aligned(x[one], [first[one]], cutoff, strength=strength, weights=weights[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-9, atol=1e-9)
    # A first round with a batch of 1 serves them all.
    torch.testing.assert_close(
        aligned(x, [first[:1]], cutoff), aligned(x, [first[:1].expand_as(x)], cutoff), rtol=1e-9, atol=1e-9
    )


@given(shapes, seeds, cutoffs)
def test_weights_of_one_are_no_weights_and_of_zero_no_change(shape, seed, cutoff):
    x, first = latent(seed, *shape), latent(seed + 1, *shape)
    ones = torch.ones(shape[0], *[1] * (len(shape) - 1), dtype=x.dtype)
    assert torch.equal(aligned(x, [first], cutoff, weights=ones), aligned(x, [first], cutoff))
    assert torch.equal(aligned(x, [first], cutoff, weights=0 * ones), x)


def test_places_outside_the_mask_keep_their_bits_and_count_for_nothing():
    x, first = latent(1, 2, 3, 8, 8, dtype=torch.float32), latent(2, 2, 3, 8, 8, dtype=torch.float32)
    weights = torch.zeros(1, 1, 8, 8)
    weights[..., 2:6, 1:5] = 1
    result = aligned(x, [first], 0.75, weights=weights)
    outside = (weights == 0).expand_as(x)
    assert torch.equal(result[outside], x[outside])
    inside = result[..., 2:6, 1:5]  # all frequencies: the region has the region's statistics
    torch.testing.assert_close(inside.mean((2, 3)), first[..., 2:6, 1:5].mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inside.std((2, 3)), first[..., 2:6, 1:5].std((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strength_0_and_equal_statistics_change_no_bit(dtype):
    x, first = latent(1, 2, 3, 6, 5, dtype=dtype), latent(2, 2, 3, 6, 5, dtype=dtype)
    assert aligned(x, [first], 0.3, strength=0.0) is x
    assert torch.equal(aligned(x, [x], 0.3), x)
    before = x.clone()
    result = aligned(x, [first], 0.3)
    assert result.dtype == dtype and result.shape == x.shape and torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float16, 2e-3), (torch.bfloat16, 2e-2),  # half of a rounding at values up to 4
    (torch.float32, 5e-6),
])
def test_low_precision_is_computed_in_fp32_and_rounded_once(dtype, tolerance):
    x, first = latent(1, 1, 3, 6, 5, dtype=dtype), latent(2, 1, 3, 6, 5, dtype=dtype)
    expected = aligned(x.double(), [first.double()], 0.3)
    torch.testing.assert_close(aligned(x, [first], 0.3).double(), expected, rtol=0, atol=tolerance)


def test_a_constant_channel_is_moved_and_not_scaled():
    """The rounding of its transform is not a deviation: scaled to 1, it would be noise."""
    x = torch.full((1, 1, 15, 7), 0.7)
    first = latent(1, 1, 1, 15, 7, dtype=torch.float32)
    result = aligned(x, [first], 0.3)
    torch.testing.assert_close(result, torch.full_like(x, first.mean().item()), rtol=0, atol=1e-5)


def test_a_device_without_complex_fft_computes_on_the_cpu(monkeypatch):
    """Simulated, with the CPU as that device: each transform asks where it may run."""
    asked = []
    monkeypatch.setattr(
        spectral_guidance, "fft_device", lambda device: asked.append(device) or torch.device("cpu")
    )
    x = latent(1, 1, 2, 4, 4, dtype=torch.float32)
    assert torch.equal(aligned(x, [x + 1], 0.3), align(x, statistics(low_pass(x + 1, 0.3)), 0.3, 1.0))
    assert asked and {str(device) for device in asked} == {"cpu"}
