"""The masks of an edit over its steps, as Explain Result shows them; apart, since a run has them only where asked."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..explanations import Explanation, Panel, spread

_STEPS = 10  # of all, spread evenly
_FRAMES = 3  # of a video
_KINDS = ("source", "edited", "union")
_SETTLED = 0.98  # overlap of two masks that are the same to the eye


class EditStep(NamedTuple):
    """The masks [B, T, H, W], 0..1, after the model's call at `sigma`; `union` is what may change."""

    sigma: float
    source: torch.Tensor
    edited: torch.Tensor
    union: torch.Tensor


def of_edit(steps: Sequence[EditStep], connected: bool) -> Explanation:
    """The masks of the batch's first picture over the steps; with a `connected` mask they are all that mask."""
    if not steps:
        raise ValueError(
            "the blend acted in none of the sampler's steps: set start_percent and end_percent of Identity Mask "
            "Blend so that steps lie between them"
        )
    shown = spread(len(steps), _STEPS)
    frames = spread(steps[0].source.shape[1], _FRAMES)
    cells = torch.stack([
        torch.stack([getattr(steps[i], kind)[0, frame] for i in shown]) for frame in frames for kind in _KINDS
    ])
    named = [f", latent frame {frame + 1}" if len(frames) > 1 else "" for frame in frames]
    rows = [f"{kind}{name}" for name in named for kind in _KINDS]
    panel = Panel("Where the subject is", rows, [f"step {i + 1}" for i in shown], cells)
    return Explanation("Identity edit", [panel], _lines(steps, connected))


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Intersection over union of two masks, 0..1; 1 for two empty ones."""
    union = torch.maximum(first, second).sum()
    return float(torch.minimum(first, second).sum() / union) if union else 1.0


def _lines(steps: Sequence[EditStep], connected: bool) -> list[str]:
    last = steps[-1]
    source, edited, union = (getattr(last, kind)[0] for kind in _KINDS)
    lines = [
        f"in the last step the source mask covers {float(source.mean()):.0%}, the edited one "
        f"{float(edited.mean()):.0%}, and {float(union.mean()):.0%} may change",
        f"edited and source mask overlap by {overlap(source, edited):.0%}",
    ]
    if connected:
        return [*lines, "a mask is connected to Identity Mask Blend, so it is the edited mask in every step"]
    settled = len(steps)
    while settled > 1 and overlap(steps[settled - 2].edited[0], last.edited[0]) >= _SETTLED:
        settled -= 1
    lines.append(f"the edited mask is as at the end from step {settled} of {len(steps)} on")
    if len(last.source) > 1:
        lines.append(f"the first of {len(last.source)} pictures is shown")
    return [*lines, "cost: no further calls of the model, only the masks of each step"]
