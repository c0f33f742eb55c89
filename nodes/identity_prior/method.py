"""Identity prior and non-rigid edit: the prior's loss, inversion, masks and the blend.

Source: LIPE (arXiv 2406.17236). Inversion: DDIM (arXiv 2010.02502), its fixed point (Pan et al., arXiv 2309.04907)
and the mean of renoised predictions (Garibi et al., arXiv 2403.14602).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..inputs.latent_masks import blend, blurred
from ..inputs.ranges import SIGMA_TOLERANCE
from ..training.objective import same_bucket
from .config import FRACTION, MEAN_STD, OTSU, QUANTILE, MaskConfig

# Ours: a map whose values differ by less of the highest one, and a mask of more than this much of the picture, do not
# show where a subject is.
FLAT, NEARLY_ALL = 0.15, 0.85
# denoise(x, sigma) -> the denoised estimate of x [B, C, ...] at sigma
Denoise = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass
class PriorObjective:
    """The loss on the subject plus `weight` times that on its class, both in one forward pass.

    losses(samples, generator) -> [B]; subject and classes draw batches of samples, of one shape each.
    """

    losses: Callable[..., torch.Tensor]
    subject: Any
    classes: Any
    weight: float

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        subject = self.subject.draw(generator)
        classes = self.classes.draw(generator)
        if not same_bucket(subject[0], classes[0]):
            first, second = (self.losses(samples, generator).mean() for samples in (subject, classes))
            return first + self.weight * second
        both = self.losses([*subject, *classes], generator)
        return both[: len(subject)].mean() + self.weight * both[len(subject) :].mean()


# Inversion


class Trajectory:
    """A latent's path from noise to itself: x [S + 1, B, C, ...] in the sampler's own scale at falling sigmas."""

    # What the edit's estimates are corrected by at each sigma but the last, [S, B, C, ...]; for FlowEdit alone.
    corrections: torch.Tensor | None = None

    def __init__(self, sigmas: Sequence[float], latents: torch.Tensor, corrections: torch.Tensor | None = None):
        self.sigmas = tuple(sigmas)
        self.latents = latents
        self.corrections = corrections

    @property
    def clean(self) -> torch.Tensor:
        return self.latents[-1]

    def at(self, sigma: float) -> torch.Tensor:
        """x at any sigma, on a straight line between its neighbours; bit for bit the stored one on the grid."""
        i, high, low = self._segment(sigma)
        if abs(sigma - high) <= SIGMA_TOLERANCE * high:
            return self.latents[i]
        if abs(sigma - low) <= SIGMA_TOLERANCE * max(low, 1e-3):
            return self.latents[i + 1]
        return torch.lerp(self.latents[i + 1], self.latents[i], (sigma - low) / (high - low))

    def denoised(self, sigma: float) -> torch.Tensor:
        """The estimate that keeps a sampler on the path: where the line from sigma on would meet sigma 0."""
        i, high, low = self._segment(sigma)
        return self.latents[i + 1] - (self.latents[i] - self.latents[i + 1]) * (low / (high - low))

    def corrected(self, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
        """An edit's estimate at sigma, with the correction there; between the grid's sigmas on a straight line."""
        if self.corrections is None:
            return denoised
        i, high, low = self._segment(sigma)
        last = len(self.corrections) - 1
        share = min(max((sigma - low) / (high - low), 0.0), 1.0)
        correction = torch.lerp(self.corrections[min(i + 1, last)], self.corrections[i], share)
        return denoised + correction.to(denoised)

    def _segment(self, sigma: float) -> tuple[int, float, float]:
        """The step that starts at sigma or above it, the first one for higher sigmas: its number and its ends."""
        lower = self.sigmas[1:-1]
        i = sum(sigma <= low * (1 + SIGMA_TOLERANCE) for low in lower)
        return i, self.sigmas[i], self.sigmas[i + 1]


def straight_path(
    denoise: Denoise, sigmas: Sequence[float], noised: Callable[[float], torch.Tensor], clean: torch.Tensor,
    on_step: Callable[[int, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlowEdit's path of `clean` [B, C, ...]: x [S + 1, B, C, ...] at falling sigmas, corrections [S, B, C, ...].

    noised(sigma) is the picture with one noise at sigma. The correction is what the model's estimate along the path
    lacks of the picture. Added to the estimate of an edit, a step of Euler is FlowEdit's: with x = z + noised - clean
    for its edited picture z, x - sigma v(x) + clean - (noised - sigma v(noised)).
    """
    path, corrections = [], []
    for i, sigma in enumerate(sigmas[:-1]):
        path.append(noised(sigma))
        corrections.append(clean - denoise(path[-1], sigma))
        on_step(i, path[-1])
    return torch.stack([*path, clean]), torch.stack(corrections)


def invert(
    denoise: Denoise, clean: torch.Tensor, sigmas: Sequence[float], scale: Callable[[float], float],
    method: str, iterations: int, on_step: Callable[[int, torch.Tensor], None],
) -> torch.Tensor:
    """The path of `clean` [B, C, ...] backwards over `sigmas`, which fall to 0: [S + 1, B, C, ...], noise first.

    A step of Euler or DDIM leads from x at `high` to x + (low - high) d(x, high) with d = (x - denoised) / sigma;
    its inverse needs d at the very x that it solves for. `ddim` takes d at a first guess, `fixed_point` repeats with
    the better one, `renoise` averages all predictions but the first. scale(sigma) is the model's input for x = 1.
    on_step(i, x) receives each new x, with the sampler's steps i in reverse order.
    """
    path = [clean]
    for i in reversed(range(len(sigmas) - 1)):
        high, low = sigmas[i], sigmas[i + 1]
        x = path[-1]
        # The same model input at both noise levels, as published for DDIM.
        guess = x * (scale(low) / scale(high))
        predictions = []
        for _ in range(1 if method == "ddim" else iterations):
            guess = x + (high - low) * (guess - denoise(guess, high)) / high
            predictions.append(guess)
        if method == "renoise" and len(predictions) > 1:
            guess = torch.stack(predictions[1:]).mean(0)
        path.append(guess)
        on_step(i, guess)
    return torch.stack(path[::-1])


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raises ValueError for sigmas that do not fall to 0, from a finite one."""
    falling = all(math.inf > a > b for a, b in zip(sigmas, sigmas[1:]))  # not for NaN
    if len(sigmas) < 2 or sigmas[-1] != 0 or not falling:
        raise ValueError(
            f"sigmas do not fall to 0 ({len(sigmas)} values): connect those of a scheduler, whole, to `sigmas`"
        )


def same_grid(edit: Sequence[float], inverted: Sequence[float]) -> bool:
    """Whether the edit's sigmas are the inverted ones, or a stretch of them without a gap."""

    def near(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=SIGMA_TOLERANCE, abs_tol=1e-6)

    starts = range(len(inverted) - len(edit) + 1)
    return any(all(map(near, edit, inverted[start : start + len(edit)])) for start in starts)


# Masks


def mean_map(maps: Sequence[torch.Tensor], resolution: int) -> torch.Tensor:
    """The mean of several layers' maps [B, T, h, w], at `resolution` cells on the longer side; 0 is the finest's."""
    finest = max(maps, key=lambda heat: heat.shape[-2] * heat.shape[-1])
    size = finest.shape[-2:]
    if resolution:
        size = [max(1, round(resolution * side / max(size))) for side in size]
    return torch.stack([_resized(heat, size) for heat in maps]).mean(0)


def subject_mask(heat: torch.Tensor, size: Sequence[int], config: MaskConfig) -> torch.Tensor:
    """0 or 1 for each latent cell, [B, T, H, W], from a heat map [B, T, h, w]: blurred, enlarged, its range from
    least to greatest set to 0..1 for each sample, and cut as `threshold_method` says. `grow` is not applied.
    """
    heat = _resized(blurred(heat.float(), config.smoothing), size)
    low, high = (edge(heat.flatten(1), 1)[..., None, None, None] for edge in (torch.amin, torch.amax))
    # A constant map does not show the subject, which may be anywhere.
    level = torch.where(high > low, (heat - low) / (high - low).clamp(min=1e-12), torch.ones_like(heat))
    cut = _CUTS[config.threshold_method](level.flatten(1), config.threshold)
    return (level >= cut.reshape(-1, 1, 1, 1)).float()


def _otsu(levels: torch.Tensor, _threshold: float) -> torch.Tensor:
    """Of each row [B, N] the least level of its upper class, where two classes differ most (Otsu, 1979)."""
    ordered = levels.double().sort(1).values
    count = levels.shape[1]
    sums, below = ordered.cumsum(1)[:, :-1], torch.arange(1, count, device=levels.device)
    difference = (ordered.sum(1, keepdim=True) - sums) / (count - below) - sums / below
    best = (below * (count - below) * difference.square()).argmax(1, keepdim=True)
    return ordered.gather(1, best + 1).to(levels)


def _mean_std(levels: torch.Tensor, threshold: float) -> torch.Tensor:
    deviations = threshold / (1 - threshold) if threshold < 1 else math.inf
    cut = levels.mean(1) + deviations * levels.std(1, correction=0).clamp(min=1e-12)
    return torch.minimum(cut, levels.amax(1))  # at least the strongest cell


# cut(levels [B, N] in 0..1, threshold) -> the level of each row from which on a cell is the subject's
_CUTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    FRACTION: lambda levels, threshold: levels.new_full((len(levels),), threshold),
    OTSU: _otsu,
    MEAN_STD: _mean_std,
    QUANTILE: lambda levels, threshold: torch.quantile(levels, threshold, dim=1),
}


def doubt(heat: torch.Tensor, mask: torch.Tensor) -> str:
    """Why a map [B, T, h, w] and its mask [B, T, H, W] do not show a subject, or nothing."""
    low, high = float(heat.min()), float(heat.max())
    if high - low <= FLAT * high:
        return "shows the subject nowhere more than elsewhere"
    covered = float(mask.float().mean())
    return f"covers {covered:.0%} of the picture" if covered >= NEARLY_ALL else ""


def fresh(noise: torch.Tensor, mask: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """`noise` [B, C, ...] with a share, 0 to 1, of new noise of the same variance where the mask
    [1 or B, 1 or T, H, W] is; elsewhere its bits stay.
    """
    new = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)).to(noise)
    return blend(math.sqrt(1 - share**2) * noise + share * new, noise, mask)


def grown(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """The mask [B, T, H, W], wider by `cells` on every side."""
    return F.max_pool2d(mask, 2 * cells + 1, stride=1, padding=cells) if cells else mask


def union(source: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """M = M_s ∪ M_e; the higher value where they are soft."""
    return torch.maximum(source, edited)


def _resized(heat: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    size = tuple(size)
    return heat if tuple(heat.shape[-2:]) == size else F.interpolate(heat, size, mode="bilinear", align_corners=False)
