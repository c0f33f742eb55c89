"""Masks of the loss: which cells of a latent a training learns from, inside a mask and outside of it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..inputs import frame_masks
from ..inputs.latents import check_finite
from .inputs import one_each
from .stored import Stored, is_stored


def pictures(masks: Sequence[torch.Tensor] | None, count: int) -> Sequence[torch.Tensor] | None:
    """One mask [1, H, W, 1] for each of `count` pictures, as batches, a list, or one for all; None if not connected.

    Raises ValueError, naming the input, for another number and for values that are not finite.
    """
    if masks is None:
        return None
    if isinstance(masks, Stored):
        singles: Sequence = masks.map(lambda mask: _checked(mask)[..., None])
    else:
        singles = [mask[None, ..., None].clone() for batch in masks for mask in _checked(batch)]
    return one_each(singles, count, "masks", kind="masks", each="picture")


def videos(masks: Sequence[torch.Tensor] | None, count: int) -> Sequence[torch.Tensor] | None:
    """One mask [F, H, W] for each of `count` videos: a list item each, or one for all. Raises as `pictures`."""
    if masks is None:
        return None
    checked = masks.map(_checked) if isinstance(masks, Stored) else [_checked(mask).clone() for mask in masks]
    return one_each(checked, count, "masks", kind="masks", each="video")


def weights(
    masks: Sequence[torch.Tensor] | None, latents: Sequence[torch.Tensor], floor: float
) -> Sequence[torch.Tensor] | None:
    """The weight of each cell of each latent [1, C, (T,) H, W], [1, 1, (T,) H, W]: 1 inside and `floor` outside.

    Masks are as `pictures` and `videos` give them. Raises ValueError for one that leaves nothing to learn.
    """
    if masks is None:
        return None

    def made(i: int) -> torch.Tensor:
        return cells(masks[i], latents[i].shape, floor, f"mask {i + 1} of masks")

    stored = Stored(len(masks), made, "")
    return stored if is_stored(masks) or is_stored(latents) else list(stored)


def cells(mask: torch.Tensor, shape: Sequence[int], floor: float, name: str = "masks") -> torch.Tensor:
    """`weights` of one mask, [1, H, W, 1] or [F, H, W], for a latent of this shape."""
    frames = mask[..., 0] if mask.ndim == 4 else mask
    if len(shape) == 5:
        frames = frame_masks.by_latent_frame(frames, shape[2])
    inside = torch.nn.functional.interpolate(frames[:, None].float(), tuple(shape[-2:]), mode="area").clamp(0, 1)
    if len(shape) == 5:
        inside = inside.movedim(0, 1)[None].expand(1, 1, shape[2], *shape[-2:])
    weight = floor + (1 - floor) * inside
    if not weight.any():
        raise ValueError(
            f"{name} is empty and mask_floor is 0, so nothing of it would be learned: paint what is to be learned, "
            "or raise mask_floor"
        )
    return weight.contiguous()


def settings(masks: Sequence[torch.Tensor] | None, floor: float, digest: Any) -> dict[str, Any]:
    """What a resumed run must share; nothing where there is no mask, as in checkpoints from before."""
    return {} if masks is None else {"masks": digest(masks), "mask_floor": floor}


def _checked(mask: torch.Tensor) -> torch.Tensor:
    """Masks as [B, H, W]."""
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3:
        raise ValueError(f"masks has shape {tuple(mask.shape)}: connect masks, [B, H, W]")
    check_finite(mask, "masks", "draw the mask again", ValueError)
    return mask
