"""What a person sees of a training: progress bar, loss curve, preview pictures, cancel."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import psutil
import torch
from PIL import Image, ImageDraw

from ..messages import tell
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .loop import State

Preview = Callable[[], Image.Image | None]

_CURVE = 96  # pixels, height of the loss curve under a preview
_UPDATES = 50  # loss curves sent over a whole run


class HostMonitor:
    """Reports to the host's progress bar, obeys its cancel button and keeps checkpoints.

    `preview()` gives a picture of what has been learnt so far, or None; it is called every `preview_every` steps.
    `phase` names what is learnt, where a node has several runs in turn.
    """

    def __init__(
        self, config: TrainingConfig, checkpoints: Checkpoints, preview: Preview | None = None,
        device: torch.device | None = None, phase: str = "",
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.preview = preview
        self.phase = phase and f"{phase}: "
        self.picture: Image.Image | None = None
        self.bar = comfy.utils.ProgressBar(config.steps)
        self.losses: list[float] = []
        self.peak = PeakMemory(device or torch.device("cpu"))
        # A method's own words beside the loss: how often it finds the right one, say.
        self.note: Callable[[], str] | None = None

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def progress(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        self.peak.look()
        config = self.config
        due = config.preview_every and (step % config.preview_every == 0 or step == config.steps)
        if due and self.preview is not None:
            self.picture = self.preview() or self.picture
        shown = due or step % max(1, config.steps // _UPDATES) == 0 or step == config.steps
        image = ("JPEG", self._card(), None) if shown else None
        self.bar.update_absolute(step, config.steps, image)
        if shown:
            recent = self.losses[-max(1, len(self.losses) // 10) :]
            noted = f", {self.note()}" if self.note is not None else ""
            mean = sum(recent) / len(recent)
            logging.info(
                "[Understudy] %soptimiser step %d of %d, loss %.4f%s", self.phase, step, config.steps, mean, noted
            )

    def checkpoint(self, state: State) -> None:
        self.checkpoints.save(state)

    def say_peak(self) -> None:
        """The most memory that the run took."""
        tell("training", [f"peak memory {self.peak.gigabytes:.2f} GB on {self.peak.device.type}"])

    def _card(self) -> Image.Image:
        """The latest preview with the loss curve under it."""
        width = 256 if self.picture is None else max(256, self.picture.width)
        top = 0 if self.picture is None else self.picture.height
        card = Image.new("RGB", (width, top + _CURVE), "white")
        if self.picture is not None:
            card.paste(self.picture, ((width - self.picture.width) // 2, 0))
        draw = ImageDraw.Draw(card)
        curve = smoothed(self.losses)
        low, high = min(curve), max(curve)
        span = (high - low) or 1.0
        points = [
            (i * (width - 1) / max(1, len(curve) - 1), top + 4 + (_CURVE - 8) * (high - value) / span)
            for i, value in enumerate(curve)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=(40, 90, 200), width=2)
        draw.text((4, top + 2), f"loss {curve[-1]:.4f}", fill="black")
        if self.note is not None:
            draw.text((4, top + 14), self.note(), fill="black")
        return card


class PeakMemory:
    """The most memory in use since this was made: of a CUDA device by its tensors, else of the whole process."""

    def __init__(self, device: torch.device):
        self.device = device
        self._bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.look()

    def look(self) -> None:
        if self.device.type == "cuda":
            self._bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._bytes = max(self._bytes, psutil.Process().memory_info().rss)

    @property
    def gigabytes(self) -> float:
        return self._bytes / 2**30


def smoothed(losses: list[float]) -> list[float]:
    """An exponential mean over about a twentieth of the run, for the eye."""
    share = 1 / max(1.0, len(losses) / 20)
    value, curve = losses[0], []
    for loss in losses:
        value += share * (loss - value)
        curve.append(value)
    return curve
