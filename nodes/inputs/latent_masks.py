"""Masks of latents: a user's in their cells, what is mixed by one, and what is blurred at its edge."""

import math

import torch
import torch.nn.functional as F

from . import frame_masks, latents


def latent_mask(mask: torch.Tensor, shape: torch.Size, name: str = "mask") -> torch.Tensor:
    """The MASK [F, H, W] of input `name` in the cells of latents of `shape` [B, C, (T,) H, W].

    Returns [1 or B, 1 or T, H, W], in which 0 and 1 stay exact. For pictures F is 1 or B, and any number where B is
    1; for videos 1, T, or the 4 (T - 1) + 1 frames of the video, of which each latent frame takes the mean. Raises
    ValueError, naming the input, for another F.
    """
    mask = mask.float().reshape(-1, *mask.shape[-2:])
    latents.check_finite(mask, name, "connect another MASK")
    cells = F.adaptive_avg_pool2d(mask.unsqueeze(1), shape[-2:]).squeeze(1).clamp(0, 1)
    if len(shape) == 5:
        return frame_masks.by_latent_frame(cells, shape[2]).unsqueeze(0)
    if shape[0] > 1:
        latents.check_batch(len(cells), shape[0], name, "mask")
    return cells.unsqueeze(1)


def blend(x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """M x + (1 - M) source, with neither's rounding where the mask [1 or B, 1 or T, H, W] is 1 or 0."""
    # For pictures the mask's T is the channels' 1; videos have their channels before it.
    weight = mask if x.ndim == 4 else mask.unsqueeze(1)
    weight = weight.to(x.device)
    source = source.to(x)
    mixed = (x * weight + source * (1 - weight)).to(x.dtype)
    return torch.where(weight >= 1, x, torch.where(weight <= 0, source, mixed))


def blurred(planes: torch.Tensor, deviation: float) -> torch.Tensor:
    """Planes [..., H, W] under a Gaussian, their edges repeated; `deviation` in cells, 0 is off."""
    if deviation == 0:
        return planes
    reach = max(1, math.ceil(3 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=planes.device) / deviation) ** 2)
    weights = weights / weights.sum()
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), weights.reshape(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), weights.reshape(1, 1, -1, 1))
    return flat.reshape(planes.shape)
