"""What nodes check of IMAGE batches that a graph connects, so that all of them say the same; without ComfyUI.

The functions raise `error`, naming the input, what was found and what to do.
"""

import torch

from .latents import check_finite


def check_pictures(
    pictures: torch.Tensor, name: str, error: type[ValueError] = ValueError, *, least: int = 0
) -> None:
    """Pictures are [B, H, W, 1, 3 or 4], at least so many."""
    if pictures.ndim != 4 or len(pictures) < least or pictures.shape[-1] not in (1, 3, 4):
        raise error(f"{name} has shape {tuple(pictures.shape)}: connect pictures, [B, H, W, 3]")


def colour(pictures: torch.Tensor, name: str, error: type[ValueError] = ValueError) -> torch.Tensor:
    """A view of finite pictures as [B, H, W, 3], without alpha and with grey repeated."""
    check_finite(pictures, name, "load or render the picture again", error)
    return pictures.expand(-1, -1, -1, 3) if pictures.shape[-1] == 1 else pictures[..., :3]
