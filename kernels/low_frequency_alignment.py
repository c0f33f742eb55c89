"""Low frequencies of a latent, and their alignment to the running average of earlier rounds' statistics.

Idea: VAE-LFA (Wang et al., "Why Do DiT Editors Drift?", arXiv 2605.08250), of which only the abstract was read: a
low-pass filter in the VAE's latent space splits what changes between rounds of editing, the low frequencies'
statistics are aligned to an exponential moving average over the previous rounds, and the high frequencies stay.
The formulas below are ours: which statistics, the shape of the filter, the weights.

Notation. x [B, C, H, W] or [B, C, T, H, W]; L(x) is x without the frequencies above a cutoff, per plane; w are
weights of the places, 1 where none are passed. Per sample and channel, over all places and frames,

    μ = Σ w L / Σ w        σ² = Σ w (L - μ)² / Σ w
    m_1 = (μ, σ) of round 1        m_k = β m_{k-1} + (1 - β) (μ, σ) of round k
    y = x + s w (σ_m/σ (L - μ) + μ_m - L)

Without weights, y - x has no frequency above the cutoff, and at s = 1 the statistics of L(y) are m.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .spectral_guidance import Band, band_mask, half_spectrum

# A deviation up to this many roundings of the largest value is that of a constant: dividing by it scales noise.
_ROUNDINGS = 16


class Statistics(NamedTuple):
    """μ and σ of the low frequencies, [B, C] each, fp32 (fp64 for fp64)."""

    mean: torch.Tensor
    deviation: torch.Tensor


def low_pass(x: torch.Tensor, cutoff: float) -> torch.Tensor:
    """x [..., H, W] without the frequencies above `cutoff`, in cycles per latent pixel; fp32 (fp64 for fp64).

    A cutoff of 0 leaves each plane's mean. The result is on the CPU where x's device lacks the complex FFT.
    """
    size, spectrum = tuple(x.shape[-2:]), half_spectrum(x)
    return torch.fft.irfft2(spectrum * band_mask(size, Band(0.0, cutoff), spectrum.device), s=size, norm="ortho")


def statistics(low: torch.Tensor, weights: torch.Tensor | None = None) -> Statistics:
    """μ and σ of low frequencies [B, C, ..., H, W]; weights >= 0 that broadcast to it, [B or 1, 1, ..., H, W].

    Where all weights of a sample are 0, both are 0.
    """
    w = (torch.ones_like(low) if weights is None else weights.to(low)).expand_as(low)
    total = w.flatten(2).sum(-1).clamp_min(torch.finfo(low.dtype).tiny)
    mean = (w * low).flatten(2).sum(-1) / total
    square = (low - _places(mean, low)).square()
    return Statistics(mean, ((w * square).flatten(2).sum(-1) / total).sqrt())


def running_average(rounds: Sequence[Statistics], momentum: float) -> Statistics:
    """m after the last of the rounds, the first one first; `momentum` β is 1 for the first alone, 0 for the last.

    A batch of 1 goes with any other. Raises ValueError for no round.
    """
    if not rounds:
        raise ValueError("rounds is empty: a running average needs at least one round")
    mean, deviation = rounds[0]
    for later in rounds[1:]:
        mean = momentum * mean + (1 - momentum) * later.mean
        deviation = momentum * deviation + (1 - momentum) * later.deviation
    return Statistics(mean, deviation)


def align(
    x: torch.Tensor, target: Statistics, cutoff: float, strength: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """y for x [B, C, ..., H, W] and a target m, [B or 1, C]; x's shape, dtype and device.

    `strength` s is 0 (x itself) to 1 (all the way). Where σ is 0 nothing is scaled, and the mean alone moves.
    """
    if strength == 0:
        return x
    low = low_pass(x, cutoff)
    mean, deviation = statistics(low, weights)
    goal = Statistics(*(value.to(low) for value in target))
    constant = _ROUNDINGS * torch.finfo(low.dtype).eps * low.abs().flatten(2).amax(-1)
    scale = torch.where(deviation > constant, goal.deviation / deviation, 1)
    # σ_m/σ (L - μ) + μ_m - L, with one rounding less: exactly 0 where the statistics are equal.
    change = (low - _places(mean, low)) * _places(scale - 1, low) + _places(goal.mean - mean, low)
    if weights is not None:
        change = weights.to(low) * change
    return (x.to(low) + strength * change).to(x)


def _places(values: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """[B, C] as [B, C, 1, ..., 1]."""
    return values[(...,) + (None,) * (low.ndim - 2)]
