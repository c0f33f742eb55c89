"""Against an explicit DFT (matrices and autograd in fp64), finite differences, and the published losses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.kernels import fft_device
from pack.kernels import spectral_guidance as sg
from support.explicit_spectrum import in_band, reference_gradient, reference_losses, self_conjugate, spectrum

SIZES = [
    (1, 1),
    (1, 2),
    (1, 7),
    (6, 1),
    (2, 2),
    (4, 4),
    (5, 4),
    (4, 5),
    (7, 9),
    (8, 8),
    (16, 12),  # a 96 x 128 theatre latent, halved
]
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)
distances = st.sampled_from(sg.DISTANCES)
rules = st.sampled_from(sg.RULES)


def latents(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


@pytest.mark.parametrize("distance", sg.DISTANCES)
@pytest.mark.parametrize("size", SIZES)
def test_losses_and_gradient_match_the_explicit_transform(size, distance):
    x, s, d = latents(1, 2, 3, *size)
    target = sg.prepare(s, d, distance=distance)
    for ours, reference in zip(sg.losses(x, target), reference_losses(x, s, d, distance), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    amplitude, phase = reference_gradient(x, s, d, distance)
    torch.testing.assert_close(sg.gradient(x, target, 1, 0), amplitude, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sg.gradient(x, target, 0, 1), phase, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        sg.gradient(x, target, 0.3, 2), 0.3 * amplitude + 2 * phase, rtol=1e-9, atol=1e-9
    )


@given(sizes, seeds, distances, st.integers(0, 50), st.integers(10, 80))
def test_gradient_matches_autograd_in_any_band(size, seed, distance, low, breadth):
    x, s, d = latents(seed, 2, *size)
    band = sg.Band(low / 100, (low + breadth) / 100)
    if not in_band(*size, band).any():
        with pytest.raises(ValueError, match="cutoff"):
            sg.prepare(s, d, amplitude_band=band)
        return
    target = sg.prepare(s, d, distance=distance, amplitude_band=band, phase_band=band)
    amplitude, phase = reference_gradient(x, s, d, distance, band, band)
    torch.testing.assert_close(sg.gradient(x, target, 1, 0), amplitude, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        sg.gradient(x, target, 0, 1), phase, rtol=1e-7, atol=1e-9 * (1 + phase.abs().max())
    )


@pytest.mark.parametrize("distance", sg.DISTANCES)
@pytest.mark.parametrize("size", SIZES)
def test_gradient_matches_finite_differences(size, distance):
    x, s, d = latents(2, 1, *size)
    target = sg.prepare(s, d, distance=distance)
    slope = sg.gradient(x, target)
    step = 1e-6
    for position in range(0, x.numel(), max(1, x.numel() // 7)):
        nudge = torch.zeros_like(x)
        nudge.view(-1)[position] = step
        above, below = (sum(sg.losses(x + sign * nudge, target)).sum() for sign in (1, -1))
        slope_here = slope.view(-1)[position].item()
        assert ((above - below) / (2 * step)).item() == pytest.approx(slope_here, rel=1e-5, abs=1e-6)


def test_by_hand_on_two_pixels():
    # x = (3, 1): X = (4, 2)/sqrt 2. s = (1, 0): |S| = (1, 1)/sqrt 2. d = (0, 1): D = (1, -1)/sqrt 2.
    x, s, d = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    target = sg.prepare(s, d)
    assert sg.losses(x, target).amplitude == pytest.approx(0.5 * (9 + 1) / 2)
    assert sg.losses(x, target).phase == pytest.approx(2 * 2 / math.sqrt(2))
    # All the way: the spectrum is (1, -1)/sqrt 2, which is d itself.
    torch.testing.assert_close(sg.update(x, target, 1, 1), d)


def reference_update(x, s, d, a, p, distance):
    """Every bin of the full spectrum by numpy; the real part at the end averages mirrored conjugates."""
    X, S, D = (np.fft.fft2(v.numpy(), norm="ortho") for v in (x, s, d))
    length = np.abs(X) + a * (np.abs(S) - np.abs(X))
    if distance == "circular":
        turn = np.angle(D * np.conj(X))
    else:
        turn = (np.abs(np.angle(D)) - np.abs(np.angle(X))) * np.sign(np.angle(X))
        turn[..., self_conjugate(*x.shape[-2:]).numpy()] = 0
    return torch.from_numpy(
        np.fft.ifft2(length * np.exp(1j * (np.angle(X) + p * turn)), norm="ortho").real.copy()
    )


@pytest.mark.parametrize("distance", sg.DISTANCES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("a", "p"), [(1, 0), (0, 1), (0.3, 0), (0, 0.3), (0.7, 0.2)])
def test_per_bin_update_matches_the_full_spectrum(size, distance, a, p):
    x, s, d = latents(3, 2, *size)
    updated = sg.update(x, sg.prepare(s, d, distance=distance), a, p)
    torch.testing.assert_close(updated, reference_update(x, s, d, a, p, distance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_transform_gets_the_spectrum_of_a_real_plane(size, monkeypatch):
    """Backends differ in what they make of another one, so the numbers alone cannot tell on this machine."""
    given_spectra = []
    inverse = torch.fft.irfft2
    monkeypatch.setattr(
        torch.fft, "irfft2", lambda v, **k: given_spectra.append(v.clone()) or inverse(v, **k)
    )
    x, s, d = latents(4, 2, *size)
    for distance in sg.DISTANCES:
        target = sg.prepare(s, d, distance=distance)
        sg.gradient(x, target)
        for rule in sg.RULES:
            sg.update(x, target, 0.2, 0.4, rule)
    assert len(given_spectra) == 6
    columns = {0, size[1] // 2} if size[1] % 2 == 0 else {0}
    for half in given_spectra:
        for i in range(size[0]):
            for j in columns:
                assert torch.equal(half[..., i, j], half[..., -i % size[0], j].conj())


@given(sizes, seeds)
def test_scale_one_takes_the_source_amplitude_and_the_driving_phase(size, seed):
    x, s, d = latents(seed, 1, *size)
    target = sg.prepare(s, d)
    X, S, D = (spectrum(v) for v in (sg.update(x, target, 1, 1), s, d))
    torch.testing.assert_close(X, S.abs() * D / D.abs(), rtol=1e-7, atol=1e-7)
    after = sg.losses(sg.update(x, target, 1, 1), target)
    assert after.amplitude.max() < 1e-14 and after.phase.max() < 1e-12


@given(sizes, seeds, distances)
def test_per_bin_losses_fall_all_the_way(size, seed, distance):
    x, s, d = latents(seed, 2, *size)
    target = sg.prepare(s, d, distance=distance)
    for term in (0, 1):
        before = sg.losses(x, target)[term]
        for scale in (0.01, 0.1, 0.3, 0.6, 1.0):
            after = sg.losses(sg.update(x, target, *((scale, 0), (0, scale))[term]), target)[term]
            assert (after[before > 1e-9] < before[before > 1e-9]).all()
            before = after
        assert after.max() < 1e-9


@given(sizes, seeds, distances)
def test_gradient_step_descends_at_the_stated_rate(size, seed, distance):
    """dG/ds at s = 0 is -t |grad G|^2 = -2 G, for either term, by a step far below any curvature."""
    x, s, d = latents(seed, 2, *size)
    target = sg.prepare(s, d, distance=distance)
    for term in (0, 1):
        before = sg.losses(x, target)[term]
        scale = 1e-7
        after = sg.losses(sg.update(x, target, *((scale, 0), (0, scale))[term], "gradient"), target)[term]
        torch.testing.assert_close((before - after) / scale, 2 * before, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("distance", sg.DISTANCES)
def test_gradient_losses_fall_at_usual_scales(distance, seed):
    x, s, d = latents(seed, 4, 12, 16)
    target = sg.prepare(s, d, distance=distance)
    for term, scales in ((0, (0.1, 0.5, 1.0)), (1, (0.003, 0.01, 0.03))):
        before = sg.losses(x, target)[term]
        for scale in scales:
            after = sg.losses(sg.update(x, target, *((scale, 0), (0, scale))[term], "gradient"), target)[term]
            assert (after < before).all()
            before = after


@given(sizes, seeds, rules, st.floats(0.01, 1))
def test_amplitude_error_shrinks_by_exactly_the_scale(size, seed, rule, scale):
    x, s, d = latents(seed, 2, *size)
    target = sg.prepare(s, d)
    before, after = (sg.losses(v, target).amplitude for v in (x, sg.update(x, target, scale, 0, rule)))
    torch.testing.assert_close(after, (1 - scale) ** 2 * before, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distance", sg.DISTANCES)
def test_gradient_step_has_the_stated_length(distance):
    x, s, d = latents(5, 2, 6, 7)
    target = sg.prepare(s, d, distance=distance)
    slope = sg.gradient(x, target, 0, 1)
    rate = 2 * sg.losses(x, target).phase / slope.square().sum((-2, -1))
    expected = x - 0.25 * rate[:, None, None] * slope
    torch.testing.assert_close(sg.update(x, target, 0, 0.25, "gradient"), expected)
    # At the target nothing is left to do, and nothing is divided by zero.
    torch.testing.assert_close(sg.update(d, sg.prepare(d, d, distance=distance), 1, 1, "gradient"), d)


@pytest.mark.parametrize("rule", sg.RULES)
@pytest.mark.parametrize("distance", sg.DISTANCES)
def test_update_has_no_unit(rule, distance):
    x, s, d = latents(6, 2, 6, 5)
    small = sg.update(x, sg.prepare(s, d, distance=distance), 0.3, 0.3, rule)
    large = sg.update(1000 * x, sg.prepare(1000 * s, 7 * d, distance=distance), 0.3, 0.3, rule)
    torch.testing.assert_close(large, 1000 * small, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", sg.RULES)
@pytest.mark.parametrize("distance", sg.DISTANCES)
@pytest.mark.parametrize("fill", ["zero", "constant", "stripes"])
def test_bins_without_a_phase_are_left_alone(fill, distance, rule):
    x, s, d = latents(7, 2, 6, 8, dtype=torch.float32)
    flat = {"zero": torch.zeros_like(x), "constant": torch.full_like(x, 3.3), "stripes": 2.0 + (x * 0)}[fill]
    if fill == "stripes":
        flat[..., ::2] = -1.0
    for estimate, source, driving in ((flat, s, d), (x, flat, d), (x, s, flat), (flat, flat, flat)):
        target = sg.prepare(source, driving, distance=distance)
        for result in (*sg.losses(estimate, target), sg.gradient(estimate, target)):
            assert torch.isfinite(result).all()
        updated = sg.update(estimate, target, 0.5, 0.5, rule)
        assert torch.isfinite(updated).all()
        # Rounding noise in an empty bin must not become signal: its amplitude stays where it was.
        if estimate is flat:
            empty = spectrum(flat.double()).abs() < 1e-5
            assert (spectrum(updated.double()).abs()[empty] < 1e-4).all()


@pytest.mark.parametrize("rule", sg.RULES)
@pytest.mark.parametrize("distance", sg.DISTANCES)
def test_rounding_of_the_transform_is_no_signal(distance, rule):
    """A flat plane of an awkward size: its empty bins hold rounding, with a phase that means nothing."""
    flat = torch.full((7, 11), 1 / 3)
    rounding = torch.fft.rfft2(flat, norm="ortho").abs().flatten()[1:]
    assert 0 < rounding.max() < 1e-5
    s, d, _ = latents(17, 7, 11, dtype=torch.float32)
    target = sg.prepare(s, d, distance=distance)
    # Only the mean has a phase, so only the mean moves.
    updated = sg.update(flat, target, 1.0, 1.0, rule)
    torch.testing.assert_close(updated, updated.mean().expand_as(updated), rtol=0, atol=1e-5)
    slope = sg.gradient(flat, target)
    torch.testing.assert_close(slope, slope.mean().expand_as(slope), rtol=0, atol=1e-5)
    # And as the driving plane it has a phase to give in its mean alone.
    moved = sg.update(s, sg.prepare(None, flat, distance=distance), 0.0, 1.0, rule) - s
    torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_the_fp32_result_cast_once(dtype):
    x, s, d = latents(8, 4, 8, 9, dtype=dtype)
    updated = sg.update(x, sg.prepare(s, d), 0.2, 0.4)
    exact = sg.update(x.float(), sg.prepare(s.float(), d.float()), 0.2, 0.4)
    assert updated.dtype == dtype and torch.equal(updated, exact.to(dtype))


def test_fp32_agrees_with_fp64():
    x, s, d = latents(9, 4, 64, 64)  # an SD 1.5 latent at 512 x 512
    target = sg.prepare(s, d)
    single = sg.prepare(s.float(), d.float())
    torch.testing.assert_close(
        sg.gradient(x.float(), single).double(), sg.gradient(x, target), rtol=0, atol=2e-5
    )
    # 64 x 64 = 4096 bins; the smallest amplitudes have the least certain phase, and weigh as little.
    near = sg.update(x.float(), single, 0.3, 0.3).double()
    torch.testing.assert_close(near, sg.update(x, target, 0.3, 0.3), rtol=0, atol=2e-5)


def test_scale_zero_returns_the_same_tensor():
    x, s, d = latents(10, 4, 4)
    assert sg.update(x, sg.prepare(s, d), 0, 0) is x
    assert sg.update(x, sg.prepare(None, d), 1, 0) is x
    assert sg.update(x, sg.prepare(s, None), 0, 1) is x


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6)])
def test_band_mask_holds_the_frequencies_between_its_cutoffs(size):
    for band in (sg.Band(0, 0.3), sg.Band(0.2, 0.4), sg.Band(0.25, 0.25), sg.ALL_BANDS):
        expected = in_band(*size, band)[:, : size[1] // 2 + 1].bool()
        if expected.any():
            assert torch.equal(sg.band_mask(size, band), expected)


def test_outside_its_band_the_spectrum_stays():
    x, s, d = latents(11, 2, 12, 10)
    low = sg.Band(0, 0.3)
    target = sg.prepare(s, d, amplitude_band=low, phase_band=low)
    for rule in sg.RULES:
        before, after = spectrum(x), spectrum(sg.update(x, target, 1, 1, rule))
        outside = in_band(12, 10, low) == 0
        torch.testing.assert_close(after[:, outside], before[:, outside], rtol=0, atol=1e-12)
        assert (after - before)[:, ~outside].abs().min() > 1e-6


def test_paper_distance_cannot_tell_a_half_turn():
    x, _, d = latents(12, 8, 8)
    turned = d.flip(-2, -1).roll((1, 1), (-2, -1))  # the half turn about the transform's origin
    assert sg.losses(turned, sg.prepare(None, d, distance="paper")).phase < 1e-20
    assert sg.losses(turned, sg.prepare(None, d)).phase > 1


def test_published_losses_map_as_documented():
    """Means of squares over an unnormalised transform, by autograd."""
    x, s, d = latents(13, 2, 4, 6, 5)
    x = x.requires_grad_()
    X, S, D = (torch.fft.fft2(v) for v in (x, s, d))
    amplitude = ((X.abs() - S.abs()) ** 2).mean()
    phase = ((X.angle().abs() - D.angle().abs()) ** 2).mean()
    published = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (amplitude, phase)]
    target = sg.prepare(s, d, distance="paper")
    x = x.detach()
    torch.testing.assert_close(published[0], 2 / (2 * 4) * sg.gradient(x, target, 1, 0))
    torch.testing.assert_close(published[1], 2 / (2 * 4 * 6 * 5) * sg.gradient(x, target, 0, 1))
    # Descent at the published rate r_a is the documented scale, which is plainly a gradient step.
    torch.testing.assert_close(x - 0.1 * published[0], sg.update(x, target, 2 * 0.1 / (2 * 4), 0, "gradient"))


def test_video_is_taken_frame_by_frame_and_batches_broadcast():
    x, s, d = latents(14, 2, 3, 5, 6, 7)
    target = sg.prepare(s[:1], d[:1, :, :1])
    together = sg.update(x, target, 0.3, 0.6)
    for b in range(2):
        for t in range(5):
            alone = sg.prepare(s[0, :, t], d[0, :, 0])
            torch.testing.assert_close(together[b, :, t], sg.update(x[b, :, t], alone, 0.3, 0.6))
    assert sg.losses(x, target).phase.shape == (2, 3, 5)


def test_a_device_without_complex_fft_falls_back(monkeypatch):
    moved = []
    monkeypatch.setattr(sg, "fft_device", lambda device: moved.append(device) or torch.device("cpu"))
    x, s, d = latents(15, 4, 4)
    assert sg.update(x, sg.prepare(s, d), 0.5, 0.5).device == x.device
    assert len(moved) == 3
    assert fft_device.fft_device("cpu") == torch.device("cpu")


def test_errors_name_the_fix():
    x, s, d = latents(16, 4, 6)
    with pytest.raises(ValueError, match="common size"):
        sg.prepare(s, d[:, :4])
    with pytest.raises(ValueError, match="circular, paper"):
        sg.prepare(s, d, distance="angle")
    with pytest.raises(ValueError, match="per_bin, gradient"):
        sg.update(x, sg.prepare(s, d), 1, 1, "newton")
    with pytest.raises(ValueError, match="prepared for latents"):
        sg.losses(x[:, :3], sg.prepare(s, d))
