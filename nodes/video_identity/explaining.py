"""How much each frame attended to a reference, for Explain Result; apart, since a run records only where asked.

A token's share is the weight of all the reference's tokens in its softmax, which otherwise belongs to the video: of
the log-sum-exps l of the segments, exp(l_I + log w) / (exp(l_V) + sum of exp(l_I + log w)), the mean over the heads.
It is measured on a grid of places, whose attention to all keys is computed a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.restricted_attention import Reference, attention_with_lse
from ..explanations import Explanation, Panel, spread
from ..inputs.ranges import SIGMA_TOLERANCE

_SIDE = 12  # places on a frame's longer side at most
_FRAMES, _STEPS, _BLOCKS = 8, 12, 40  # shown of all, spread evenly


class Shares:
    """The shares of one run: for each reference, step and block the mean of its calls, [T, h, w] on the CPU.

    Thread-safe, since several devices may run parts of a call.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self.places, self.tokens = 0, 0  # of a frame, measured and there

    def add(self, key: tuple[int, int, int], frames: Sequence[int], total: int, shares: torch.Tensor) -> None:
        """Add shares [len(frames), h, w] of some frames of `total`, for (reference, step, block)."""
        with self._lock:
            empty = torch.zeros(total, *shares.shape[1:]), torch.zeros(total, 1, 1)
            sums, counts = self._sums.setdefault(key, empty)
            sums[list(frames)] += shares
            counts[list(frames)] += 1

    def tables(self) -> dict[int, tuple[list[int], list[int], torch.Tensor]]:
        """Of each reference its steps, its blocks, and the shares [steps, blocks, T, h, w]; NaN where it was off."""
        tables = {}
        for reference in sorted({key[0] for key in self._sums}):
            own = {key[1:]: sums / counts for key, (sums, counts) in self._sums.items() if key[0] == reference}
            steps, blocks = (sorted({key[axis] for key in own}) for axis in (0, 1))
            blank = torch.full_like(next(iter(own.values())), torch.nan)
            rows = [torch.stack([own.get((step, block), blank) for block in blocks]) for step in steps]
            tables[reference] = steps, blocks, torch.stack(rows)
        return tables


@dataclass(eq=False)
class CallRecorder:
    """What one call of the model adds to a run's shares.

    grid: frames, rows and columns of the video's tokens, after `leading` others; rows: the part of the batch that
    counts, the positive's; numbers: of each block the numbers of its references, in order.
    """

    shares: Shares
    step: int
    frames: Sequence[int]
    total: int
    grid: tuple[int, int, int]
    leading: int
    rows: slice
    numbers: Mapping[int, Sequence[int]]

    @torch.compiler.disable
    def record(
        self, block: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, references: Sequence[Reference]
    ) -> None:
        """Called by the patch of a block with its attention's q, k and v, [B, T, H, D], and references."""
        places, size = _places(self.grid)
        self.shares.places, self.shares.tokens = size[0] * size[1], self.grid[1] * self.grid[2]
        places = (places + self.leading).to(q.device)
        q, k, v = q[self.rows][:, places], k[self.rows], v[self.rows]  # views, but for q's few
        logs = [attention_with_lse(q, k, v)[1]]
        for reference in references:
            of_batch = [self._of_batch(part, len(q)) for part in (reference.k, reference.v)]
            log = attention_with_lse(q, *of_batch)[1]
            if reference.weight is not None:
                weight = reference.weight.reshape(-1, reference.weight.shape[-1])
                weight = weight[:, places] if weight.shape[-1] > 1 else weight
                log = log + torch.log(self._of_batch(weight, len(q)).to(log))[..., None]
            logs.append(log)
        of_each = torch.stack(logs).softmax(0).mean((1, 3))  # over batch and heads: [1 + references, places]
        for number, share in zip(self.numbers[block], of_each[1:], strict=True):
            values = share.float().cpu().unflatten(0, (len(self.frames), *size))
            self.shares.add((number, self.step, block), self.frames, self.total, values)

    def _of_batch(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """The rows of the positive, or the only one for all."""
        return part.expand(count, *part.shape[1:]) if len(part) == 1 else part[self.rows]


def call_recorder(
    shares: Shares, sigma: float, options: Mapping[str, Any], grid: tuple[int, int, int], leading: int, batch: int,
    total: int, numbers: Mapping[int, Sequence[int]],
) -> CallRecorder | None:
    """The recorder of a call at `sigma`; None for one without the positive, or whose frames are not known."""
    entries = options.get("cond_or_uncond") or [0]
    size, positive = batch // len(entries), entries.index(0) if 0 in entries else None
    window = options.get("context_window")
    frames = list(getattr(window, "index_list", None) or range(grid[0]))
    if positive is None or len(frames) != grid[0] or max(frames) >= total:
        return None
    sigmas = options.get("sample_sigmas")
    step = 0 if sigmas is None else int((sigmas > sigma * (1 + SIGMA_TOLERANCE)).sum())
    rows = slice(positive * size, (positive + 1) * size)
    return CallRecorder(shares, step, frames, total, grid, leading, rows, numbers)


def _places(grid: tuple[int, int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Positions in a video of this grid, [T * h * w], and h and w: evenly spread, with the frames' edges."""
    frames, height, width = grid
    scale = min(1.0, _SIDE / max(height, width))
    size = tuple(max(1, round(side * scale)) for side in (height, width))
    rows, columns = (
        torch.linspace(0, side - 1, count).round().long() if count > 1 else torch.tensor([side // 2])
        for side, count in zip((height, width), size, strict=True)
    )
    frame = rows[:, None] * width + columns
    return (torch.arange(frames)[:, None] * height * width + frame.flatten()).flatten(), size


# What is shown


def of_video(shares: Shares) -> Explanation:
    """Each reference's share by block and step, by frame and step, and over the frames."""
    tables = shares.tables()
    if not tables:
        raise ValueError(
            "the reference acted in none of the sampler's steps: set start_percent and end_percent of Apply Video "
            "Identity so that steps lie between them"
        )
    panels, lines = [], []
    for number, (steps, blocks, values) in tables.items():
        name = f"reference {number + 1}" if len(tables) > 1 else "the reference"
        chosen = spread(len(steps), _STEPS), spread(len(blocks), _BLOCKS), spread(values.shape[2], _FRAMES)
        step_names = [f"step {steps[i] + 1}" for i in chosen[0]]
        frame_names = [f"frame {i + 1}" for i in chosen[2]]
        by_block = values.mean((2, 3, 4)).T[chosen[1]][:, chosen[0]]
        by_frame = values.nanmean(1).mean((-2, -1)).T[chosen[2]][:, chosen[0]]
        over_frames = values.nanmean((0, 1))[chosen[2]]
        panels += [
            _panel(
                f"Attention to {name}: by block and step", [f"block {blocks[i]}" for i in chosen[1]], step_names,
                by_block[..., None, None],
            ),
            _panel(
                f"Attention to {name}: by latent frame and step", frame_names, step_names, by_frame[..., None, None]
            ),
            _panel(f"Attention to {name}: where in each latent frame", ["mean"], frame_names, over_frames[None]),
        ]
        lines += _lines(name, steps, blocks, values)
    cost = shares.places / max(1, shares.tokens)
    lines.append(
        f"cost: {shares.places} of {shares.tokens} places of each frame were computed again in every block and step, "
        f"about {cost:.0%} more self-attention"
    )
    return Explanation("Video identity", panels, lines)


def _panel(title: str, rows: Sequence[str], columns: Sequence[str], cells: torch.Tensor) -> Panel:
    cells = cells.nan_to_num()  # where the reference was off
    return Panel(title, rows, columns, cells, max(1e-6, float(cells.amax())))


def _lines(name: str, steps: Sequence[int], blocks: Sequence[int], values: torch.Tensor) -> list[str]:
    """The extremes in words."""
    by_block, by_step = values.nanmean((0, 2, 3, 4)), values.nanmean((1, 2, 3, 4))
    by_frame = values.nanmean((0, 1, 3, 4))
    most, least = int(by_frame.argmax()), int(by_frame.argmin())
    return [
        f"{name} has {float(values.nanmean()):.1%} of the frames' attention on average",
        f"most in block {blocks[int(by_block.argmax())]} ({float(by_block.amax()):.1%}) and in step "
        f"{steps[int(by_step.argmax())] + 1} ({float(by_step.amax()):.1%})",
        f"most in latent frame {most + 1} ({float(by_frame[most]):.1%}), least in {least + 1} "
        f"({float(by_frame[least]):.1%})",
    ]
