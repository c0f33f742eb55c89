"""Positions, masks, settings and the cache; no ComfyUI in the code under test."""


import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.video_identity import method
from pack.nodes.video_identity.config import ReferenceConfig, VideoIdentityConfig

ADAPTER = method.VideoAdapter(())


def latent(seed=0, *shape):
    return torch.randn(shape or (1, 16, 1, 4, 4), generator=torch.Generator().manual_seed(seed))


def test_reference_positions_are_the_published_ones():
    """A 512 x 512 reference beside a video of 832 x 480: t = -1, rows from 30, columns from 52."""
    positions = method.reference_positions(32, 32, 30, 52)
    assert positions.shape == (1, 1024, 3)
    expected = [(-1, 30 + h, 52 + w) for h in range(32) for w in range(32)]
    assert positions[0].tolist() == [list(map(float, p)) for p in expected]


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.sampled_from(["one", "latent", "video"]),
    st.integers(0, 99),
)
def test_token_weights_are_the_mean_over_each_token(frames, height, width, kind, seed):
    """By loops, for masks of 8 pixels a latent cell; padded cells repeat the edge."""
    count = {"one": 1, "latent": frames, "video": 4 * (frames - 1) + 1}[kind]
    mask = torch.rand(count, 8 * height, 8 * width, generator=torch.Generator().manual_seed(seed))
    weights = method.token_weights(mask, frames, height, width, (2, 2))
    rows, columns = (height + 1) // 2, (width + 1) // 2
    assert weights.shape == (frames, rows, columns)
    for t in range(frames):
        if kind == "one" or count == 1:
            chosen = [0]
        elif count == frames:
            chosen = [t]
        else:
            chosen = [0] if t == 0 else [4 * t - 3, 4 * t - 2, 4 * t - 1, 4 * t]
        for r in range(rows):
            for c in range(columns):
                total = 0.0
                for dy in (0, 1):
                    for dx in (0, 1):
                        y, x = min(2 * r + dy, height - 1), min(2 * c + dx, width - 1)
                        total += sum(float(mask[f, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean()) for f in chosen)
                assert abs(float(weights[t, r, c]) - total / (4 * len(chosen))) < 1e-5


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_uniform_masks_of_any_size_stay_exact(mask_height, mask_width, frames, height, width, per_frame):
    count = 4 * (frames - 1) + 1 if per_frame else 1
    for value in (0.0, 1.0):
        mask = torch.full((count, mask_height, mask_width), value)
        weights = method.token_weights(mask, frames, height, width, (2, 2))
        assert bool((weights == value).all())


def test_a_mask_of_another_length_names_both():
    with pytest.raises(ValueError, match=r"mask has 6 frames and the video has 9 \(3 in the latent\)"):
        method.token_weights(torch.ones(6, 8, 8), 3, 4, 4, (2, 2))


@pytest.mark.parametrize(("text", "expected"), [
    ("all", None), (" All ", None), ("0", {0}), ("0-2", {0, 1, 2}), ("0, 3-4,7", {0, 3, 4, 7}), ("2 - 3", {2, 3}),
])
def test_blocks(text, expected):
    assert VideoIdentityConfig(blocks=text).blocks == text
    if expected:
        with pytest.raises(ValueError, match="has 0 to"):
            method.selected_blocks(VideoIdentityConfig(blocks=text), max(expected))
    assert method.selected_blocks(VideoIdentityConfig(blocks=text), 8) == (expected or set(range(8)))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: VideoIdentityConfig(strength=2.5), "strength is 2.5: use 0"),
    (lambda: VideoIdentityConfig(strength=float("nan")), "strength"),
    (lambda: VideoIdentityConfig(start_percent=0.5, end_percent=0.5), "range of steps is empty"),
    *(
        (lambda text=text: VideoIdentityConfig(blocks=text), "blocks is")
        for text in ("", "x", "3-1", "-1", "1,,2", "1.5")
    ),
    (lambda: ReferenceConfig(size=500), "multiple of 16"),
    (lambda: ReferenceConfig(crop_factor=0.5), "crop_factor is 0.5"),
])
def test_settings_that_hold_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("reference", "mask", "message"), [
    (latent(0, 2, 16, 1, 4, 4), None, "holds 2 latents of 1 frames.*one picture"),
    (latent(0, 1, 16, 3, 4, 4), None, "1 latents of 3 frames"),
    (torch.ones(0, 16, 1, 4, 4), None, "reference is an empty batch"),
    (torch.zeros(1, 16, 1, 4, 4), None, "all zero"),
    (torch.full((1, 16, 1, 4, 4), float("nan")), None, "NaN"),
    (torch.ones(1, 16, 100), None, "not an image or video latent"),
    (latent(), torch.ones(1, 1, 4, 4), "mask has shape"),
    (latent(), torch.ones(0, 4, 4), "mask has shape"),
    (latent(), torch.full((1, 4, 4), float("inf")), "mask holds NaN or infinite"),
])
def test_references_and_masks_that_cannot_be_are_refused(reference, mask, message):
    with pytest.raises(ValueError, match=message):
        method.video_reference(ADAPTER, reference, VideoIdentityConfig(), mask)


def test_an_identity_is_named_by_its_content_and_shares_nothing():
    reference, mask = latent(), torch.tensor([[-1.0, 2.0]])
    result = method.video_reference(ADAPTER, reference, VideoIdentityConfig(), mask)
    assert result.mask.tolist() == [[[0.0, 1.0]]] and result.latent.shape == (1, 16, 1, 4, 4)
    original = reference.clone()
    reference.zero_()  # as a node that works in place may do
    assert torch.equal(result.latent, original)
    reference = original
    again = method.video_reference(ADAPTER, reference[:, :, 0].half().float(), VideoIdentityConfig())
    same = method.video_reference(ADAPTER, reference[:, :, 0], VideoIdentityConfig())
    assert again.digest != result.digest == same.digest
    assert not result.off and method.video_reference(ADAPTER, reference, VideoIdentityConfig(strength=0.0)).off
    assert method.video_reference(ADAPTER, reference, VideoIdentityConfig(), torch.zeros(3, 4, 4)).off


def test_the_bell_puts_the_weight_where_the_official_training_has_it():
    """The shares that the audit of that training states, from its formulas as numpy has them."""
    even = np.arange(1, 1001) / 1000
    sigmas = 5 * even / (1 + 4 * even)
    np.testing.assert_allclose(method.training_sigmas().numpy(), sigmas, rtol=1e-6)
    bell = np.exp(-2 * (sigmas * 1000 - 500) ** 2 / 1000**2)
    bell = bell - bell.min()
    weight = method.bell_weight(method.training_sigmas()).double().numpy()
    np.testing.assert_allclose(weight, bell * (1000 / bell.sum()), rtol=1e-3, atol=2e-4)
    assert weight.mean() == pytest.approx(1, abs=1e-4) and weight.min() >= -1e-6
    assert weight[sigmas >= 0.9].sum() / 1000 == pytest.approx(0.10, abs=0.01)
    assert weight[sigmas < 0.8].sum() / 1000 == pytest.approx(0.72, abs=0.01)
