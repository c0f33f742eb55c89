"""Weights of reference pictures in attention: which row sees which reference how much. Ours; no ComfyUI.

The rows of one sequence are those of the text, of the sampled picture, and of each reference in turn. A weight w of a
reference for a row multiplies the reference's unnormalised attention there, which is adding log w to its scores; the
reference's own rows see it as they did, since they are how it is computed. The formula for weighted columns is in
kernels/restricted_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels import restricted_attention
from ...kernels.restricted_attention import Reference
from ..inputs import latents
from .config import ReferenceWeightConfig


@dataclass(frozen=True, eq=False, repr=False)
class Weighing:
    """One node's settings; mask: [F, H, W] in 0..1, one for all or one for each of the batch, or None."""

    config: ReferenceWeightConfig
    mask: torch.Tensor | None = None

    @property
    def off(self) -> bool:
        """True where it changes nothing."""
        return self.config.strength == 1 and (self.mask is None or bool((self.mask == 1).all()))


@dataclass(frozen=True)
class Layout:
    """How many rows of a sequence belong to the text, to the sampled picture and to each reference, in this order."""

    text: int
    picture: int
    references: tuple[int, ...]

    @property
    def columns(self) -> list[slice]:
        """Where each reference is in the sequence."""
        starts = [self.text + self.picture + sum(self.references[:i]) for i in range(len(self.references))]
        return [slice(start, start + count) for start, count in zip(starts, self.references, strict=True)]


def weighing(config: ReferenceWeightConfig, mask: torch.Tensor | None) -> Weighing:
    """Checked settings of a node. Raises ValueError, naming the input, for another mask than [H, W] or [F, H, W]."""
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.numel() == 0:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: connect one MASK, or one per picture of the batch")
        latents.check_finite(mask, "mask", "connect another MASK")
        mask = mask.detach().float().clamp(0, 1).cpu()
    return Weighing(config, mask)


def token_mask(mask: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """The mean of a mask [F, H, W] over each token of a latent of this size, [F, rows * columns]; 0 and 1 stay exact.
    """
    cells = torch.nn.functional.adaptive_avg_pool2d(mask.unsqueeze(1), (height, width))
    # The model pads beyond the edge; the cells there repeat its value.
    cells = torch.nn.functional.pad(cells, (0, -width % patch, 0, -height % patch), mode="replicate")
    return torch.nn.functional.avg_pool2d(cells, patch).flatten(1)


def row_weights(
    layout: Layout, number: int, weighings: Sequence[tuple[float, torch.Tensor | None]]
) -> torch.Tensor | None:
    """The weight of reference `number`, counted from 0, for every row, [1 or F, N]; None where all are 1.

    weighings: strengths, each with the tokens' mask [F, P] of the picture or None; several of them multiply.
    """
    count = max((len(mask) for _, mask in weighings if mask is not None), default=1)
    total = layout.text + layout.picture + sum(layout.references)
    weights = torch.ones(count, total)
    for strength, mask in weighings:
        factor = torch.full((count, total), float(strength))
        if mask is not None:
            # A picture of several frames has so many tokens for each.
            tokens = mask.repeat(1, layout.picture // mask.shape[1])
            factor[:, layout.text : layout.text + layout.picture] *= tokens
            factor *= mask.any(1, keepdim=True)  # a mask without any place means nowhere, for the text as well
        weights *= factor
    weights[:, layout.columns[number]] = 1.0
    return None if bool((weights == 1).all()) else weights


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, columns: Sequence[slice],
    weights: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Attention [B, N, H, D] of rows q to columns k and v [B, M, H, D], with a weight [1 or B, N] of each reference's
    columns for every row, or None for 1; exact, by the log-sum-exp of each part.
    """
    weighed = [(part, weight) for part, weight in zip(columns, weights, strict=True) if weight is not None]
    plain = torch.ones(k.shape[1], dtype=torch.bool, device=k.device)
    for part, _ in weighed:
        plain[part] = False
    references = [Reference(k[:, part], v[:, part], weight.to(q.device)) for part, weight in weighed]
    return restricted_attention.weighted(q, k[:, plain], v[:, plain], references)


def bias(
    shape: Sequence[int], columns: Sequence[slice], weights: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """log w as what attention adds to its scores, [1 or B, 1, N, M], fp32, where a model has a mask of its own."""
    rows, total = shape
    count = max(len(weight) for weight in weights if weight is not None)
    added = torch.zeros(count, 1, rows, total)
    for part, weight in zip(columns, weights, strict=True):
        if weight is not None:
            added[:, 0, :, part] = weight.log()[:, :, None]
    return added
