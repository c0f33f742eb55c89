"""Drift alignment: a new round's low frequencies get the statistics that earlier rounds had on average.

The idea is VAE-LFA's (arXiv 2605.08250, abstract); the formulas are in kernels/low_frequency_alignment.py. Masks,
videos and rounds of different sizes are ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...kernels import low_frequency_alignment as kernel
from ..inputs.latents import check_batch, check_channels, check_finite, check_picture
from .config import DriftAlignmentConfig


def align_drift(
    latent: torch.Tensor, earlier: Sequence[torch.Tensor], config: DriftAlignmentConfig,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`latent` [B, C, H, W] or [B, C, T, H, W], aligned to the rounds before it, the first one first.

    earlier: latents of any size and frame count, with C channels and a batch of 1 or B. mask: MASK [1 or B, H, W] in
    0..1, for all frames: 1 where to compare and align. Raises ValueError, naming the input, for anything else.
    """
    check_picture(latent, "latent")
    if not earlier:
        raise ValueError("earlier holds no latent: connect those of the rounds before, the first one first")
    for number, samples in enumerate(earlier):
        name = f"earlier (round {number})"
        check_picture(samples, name)
        check_channels(samples, name, latent.shape[1], "make all rounds with the same VAE")
        check_batch(len(samples), len(latent), name, "latent")
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        check_finite(mask, "mask", "connect another MASK")
        check_batch(len(mask), len(latent), "mask", "mask")

    rounds = []
    for samples in earlier:
        low = kernel.low_pass(samples.to(latent.device), config.cutoff)
        rounds.append(kernel.statistics(low, _weights(mask, samples)))
    target = kernel.running_average(rounds, config.momentum)
    return kernel.align(latent, target, config.cutoff, config.strength, _weights(mask, latent))


def _weights(mask: torch.Tensor | None, samples: torch.Tensor) -> torch.Tensor | None:
    """The mask's mean over each cell of these latents, [1 or B, 1, (1,) H, W]; 0 and 1 stay exact."""
    if mask is None:
        return None
    cells = F.adaptive_avg_pool2d(mask.float().unsqueeze(1), samples.shape[-2:]).clamp(0, 1)
    return cells.unsqueeze(2) if samples.ndim == 5 else cells
