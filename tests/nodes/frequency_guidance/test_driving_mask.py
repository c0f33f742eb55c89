"""Phases of the driving subject alone, inside its mask, against numpy."""

import numpy as np
import pytest
import torch
from pack.kernels import spectral_guidance, wavelet_detail
from pack.nodes.frequency_guidance import method
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig

from .test_method import MODEL, everywhere, noise

PHASE = everywhere(amplitude_scale=0.0, phase_scale=1.0)
SHAPE = (1, 4, 8, 8)


def guided(x, driving, mask, source_mask=None, config=PHASE, source=None):
    source = noise(8, *driving.shape) if source is None else source
    guidance = method.FrequencyGuidance(source, driving, config, source_mask, mask)
    return guidance.begin(MODEL, x.shape)(x, 5.0)


def box(top, bottom, left, right, size=8, value=1.0):
    mask = torch.zeros(1, size, size)
    mask[:, top:bottom, left:right] = value
    return mask


def test_a_mask_of_everything_is_no_mask_bit_for_bit():
    x, driving = noise(1, 2, 4, 8, 8), noise(2, *SHAPE)
    full = everywhere(amplitude_scale=0.4, phase_scale=0.7)
    for config in (PHASE, full):
        masked, plain = (guided(x, driving, mask, config=config) for mask in (torch.ones(1, 64, 64), None))
        assert torch.equal(masked, plain)


def test_the_driving_scene_does_not_come_along():
    x, driving, mask = noise(1, *SHAPE), noise(2, *SHAPE), box(2, 6, 3, 7)
    other = torch.where(mask[None] > 0, driving, noise(3, *SHAPE))
    assert torch.equal(guided(x, driving, mask), guided(x, other, mask))
    assert not torch.allclose(guided(x, driving, None), guided(x, other, None), atol=0.1)


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_the_phases_are_those_of_the_subject_on_its_own_mean(value):
    x, driving, mask = noise(1, *SHAPE), noise(2, *SHAPE), box(2, 6, 3, 7, value=value)
    m, d = mask.double().numpy(), 0.5 * driving.double().numpy()  # MODEL halves what a VAE gives
    mean = (d * m).sum((-2, -1), keepdims=True) / m.sum()
    scene = m * d + (1 - m) * mean
    amplitude, phase = np.abs(np.fft.fft2(x.double().numpy())), np.angle(np.fft.fft2(scene))
    expected = m * np.fft.ifft2(amplitude * np.exp(1j * phase)).real + (1 - m) * x.double().numpy()
    np.testing.assert_allclose(guided(x, driving, mask).numpy(), expected, atol=1e-5)


def test_outside_the_mask_the_phase_term_leaves_the_scene_as_it_is():
    x, driving, source, mask = noise(1, *SHAPE), noise(2, *SHAPE), noise(3, *SHAPE), box(2, 6, 3, 7)
    outside = (mask == 0).expand(4, 8, 8)
    moved = guided(x, driving, mask)
    assert torch.equal(moved[0][outside], x[0][outside]) and not torch.allclose(moved, x, atol=0.1)
    both, amplitude = (everywhere(amplitude_scale=0.4, phase_scale=p) for p in (1.0, 0.0))
    moved, alone = (guided(x, driving, mask, config=config, source=source) for config in (both, amplitude))
    assert torch.equal(moved[0][outside], alone[0][outside]) and not torch.allclose(moved, alone, atol=0.1)


@pytest.mark.parametrize("distance", ["circular", "paper"])
def test_the_loss_toward_the_subject_falls_and_a_mask_of_half_the_cells_leaves_more_of_the_estimate(distance):
    x, driving, mask = noise(1, *SHAPE), noise(2, *SHAPE), box(2, 6, 3, 7)
    config = everywhere(amplitude_scale=0.0, phase_scale=0.5, phase_distance=distance)
    target = spectral_guidance.prepare(None, method.alone(0.5 * driving, mask[None]), distance=distance)
    before = spectral_guidance.losses(x, target).phase.sum()
    moved = guided(x, driving, mask, config=config)
    assert spectral_guidance.losses(moved, target).phase.sum() < 0.95 * before
    assert (moved - x).abs().mean() < (guided(x, driving, None, config=config) - x).abs().mean()


def test_a_video_takes_a_mask_for_each_frame_and_a_picture_serves_all():
    x, driving = noise(1, 1, 4, 3, 8, 8), noise(2, 1, 4, 3, 8, 8)
    masks = torch.stack([box(0, 4, 0, 4)[0], box(2, 6, 2, 6)[0], box(4, 8, 4, 8)[0]])
    together = guided(x, driving, masks)
    for frame in range(3):
        alone = guided(x[:, :, frame], driving[:, :, frame], masks[frame : frame + 1])
        torch.testing.assert_close(together[:, :, frame], alone, rtol=0, atol=1e-6)
    one = guided(x, driving[:, :, :1], masks[:1])
    torch.testing.assert_close(one[:, :, 2], guided(x[:, :, 2], driving[:, :, 0], masks[:1]), rtol=0, atol=1e-6)


def test_the_driving_subject_is_put_where_the_source_is():
    """A picture of its own coordinates, moved by hand: half as large, with its foot at another place."""
    size = 16
    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    driving = torch.stack([rows, columns])[None]
    at, to = box(0, 8, 0, 8, size), box(10, 14, 6, 10, size)
    placed, mask = method.aligned(driving, at[None], to[None])
    torch.testing.assert_close(mask[0], to, rtol=0, atol=1e-5)
    inside = to[0] > 0
    # Row r of the target comes from 8 + 2 (r - 14), column c from 4 + 2 (c - 8); an edge mixes with the border.
    for plane, expected in zip(placed[0], (8 + 2 * (rows - 14), 4 + 2 * (columns - 8)), strict=True):
        torch.testing.assert_close(plane[inside], expected[inside].clamp(0.5, size - 0.5), rtol=0, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(method.aligned(driving, at[None], at[None]), (driving, at[None])))


def test_a_source_mask_moves_the_guidance():
    x, driving = noise(1, *SHAPE), noise(2, *SHAPE)
    at, to = box(1, 5, 1, 5), box(4, 8, 3, 7)
    shifted = torch.roll(driving, (3, 2), (-2, -1))
    torch.testing.assert_close(guided(x, driving, at, to), guided(x, shifted, to, to), rtol=0, atol=1e-4)


def test_the_subject_is_seen_in_the_sources_scene_without_the_sources_subject():
    x, driving, source = noise(1, *SHAPE), noise(2, *SHAPE), noise(3, *SHAPE)
    at, to = box(1, 5, 1, 5), box(4, 8, 3, 7)
    moved = guided(x, driving, at, to, source=source)
    # What stands in the source's mask, and a cell around it, is not in the phases; what is further away is.
    cleared = source.clone()
    cleared[..., 3:8, 2:8] = 7.0
    assert torch.equal(guided(x, driving, at, to, source=cleared), moved)
    cleared[..., 0, 0] += 1
    assert not torch.allclose(guided(x, driving, at, to, source=cleared), moved, atol=0.01)
    # By hand: the picture whose phases act.
    placed, mask = method.aligned(0.5 * driving, at[None], to[None])
    scene = placed * mask + method.without_subject(0.5 * source, to[None]) * (1 - mask)
    target = spectral_guidance.prepare(None, scene)
    torch.testing.assert_close(moved, spectral_guidance.update(x, target, 0.0, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [(), (2,)])
def test_a_subjects_place_is_filled_from_around_it(frames):
    level = torch.linspace(-1, 1, 16).expand(1, 1, *frames, 16, 16)
    filled = method.without_subject(level, box(5, 11, 5, 11, 16)[None])
    kept = torch.ones(16, 16, dtype=torch.bool)
    kept[4:12, 4:12] = False
    assert torch.equal(filled[..., kept], level[..., kept])
    torch.testing.assert_close(filled, level.contiguous(), rtol=0, atol=0.35)
    even = torch.full_like(filled, 3.0)
    torch.testing.assert_close(method.without_subject(even, box(5, 11, 5, 11, 16)[None]), even)
    assert torch.isfinite(method.without_subject(level, torch.ones(1, 1, 16, 16))).all()


@pytest.mark.parametrize(("masks", "message"), [
    ((None, torch.zeros(1, 8, 8)), "driving_mask is empty"),
    ((torch.zeros(1, 8, 8), torch.ones(1, 8, 8)), "source_mask is empty"),
    ((torch.ones(1, 8, 8), None), "connect its driving_mask"),
    ((None, torch.full((1, 8, 8), torch.nan)), "driving_mask holds NaN"),
    ((None, torch.ones(3, 8, 8)), "driving_mask"),
])
def test_masks_that_cannot_be_used_are_refused(masks, message):
    x = noise(1, 2, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        guided(x, noise(2, *SHAPE), masks[1], masks[0])


def test_without_a_phase_term_masks_change_nothing():
    x, driving, source = noise(1, *SHAPE), noise(2, *SHAPE), noise(3, *SHAPE)
    config = FrequencyGuidanceConfig(amplitude_scale=0.5, phase_scale=0.0, end_percent=1.0)
    masked, plain = (guided(x, driving, m, config=config, source=source) for m in (box(2, 6, 3, 7), None))
    assert torch.equal(masked, plain)


def test_detail_bands_follow_the_source_alone_and_are_off_at_zero():
    x, driving, source = noise(1, *SHAPE), noise(2, *SHAPE), noise(3, *SHAPE)
    off = {"amplitude_scale": 0.0, "phase_scale": 0.0, "end_percent": 0.6}
    config = FrequencyGuidanceConfig(**off, detail_bands=2)
    guide = method.FrequencyGuidance(source, driving, config).begin(MODEL, x.shape)
    assert torch.equal(guide(x, 9.0), wavelet_detail.inject(x, 0.5 * source, 2)) and guide(x, 1.0) is x
    assert FrequencyGuidanceConfig(**off).off and not config.off
    with pytest.raises(ValueError, match="detail_bands is 5"):
        FrequencyGuidanceConfig(detail_bands=5)
