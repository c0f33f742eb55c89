"""A user's masks in the cells of latents."""

import pytest
import torch
from pack.nodes.inputs.latent_masks import blend, latent_mask


def test_video_masks_follow_the_frames():
    shape = torch.Size((1, 16, 3, 4, 4))
    frames = torch.arange(9.0)[:, None, None].expand(9, 8, 8) / 8
    cells = latent_mask(frames, shape)
    assert cells.shape == (1, 3, 4, 4)
    assert cells[0, :, 0, 0].tolist() == pytest.approx([0, 2.5 / 8, 6.5 / 8])
    assert latent_mask(frames[:1], shape).shape == (1, 1, 4, 4)
    assert latent_mask(frames[:3], shape)[0, :, 0, 0].tolist() == pytest.approx([0, 1 / 8, 2 / 8])
    with pytest.raises(ValueError, match="mask has 5 frames"):
        latent_mask(frames[:5], shape)
    with pytest.raises(ValueError, match="NaN"):
        latent_mask(torch.full((1, 4, 4), torch.nan), shape)


def test_what_is_mixed_has_no_rounding_where_the_mask_is_whole():
    x, other = (torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    mask = torch.tensor([[1.0, 0.0, 0.25]]).expand(1, 1, 3, 3)
    mixed = blend(x, other, mask)
    assert torch.equal(mixed[..., 0], x[..., 0]) and torch.equal(mixed[..., 1], other[..., 1])
    torch.testing.assert_close(mixed[..., 2], 0.25 * x[..., 2] + 0.75 * other[..., 2])
