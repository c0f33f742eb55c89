"""What a node shows of a training: progress bar, loss curve, preview pictures; and its cancel button."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.utils
import psutil
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError

from ..messages import tell
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .loop import State

# What a preview or a checkpoint may end with: no memory, no disk, or a model that cannot be drawn.
FAILURES = (
    RuntimeError, MemoryError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    SafetensorError,
)

Preview = Callable[[], Image.Image | None]

_CURVE = 96  # pixels, height of the loss curve under a preview
_UPDATES = 50  # loss curves sent over a whole run


class NodeMonitor:
    """Reports to ComfyUI's progress bar, obeys its cancel button and saves checkpoints, if there are any.

    `preview()` draws what has been learned so far, or returns None; it is called every `preview_every` steps.
    `note()` is a figure of the method's own beside the loss. `phase` says what is being trained, where a node has
    several runs in turn. `extra_tensors` are stored in each checkpoint.
    """

    def __init__(
        self, config: TrainingConfig, device: torch.device, checkpoints: Checkpoints | None = None,
        preview: Preview | None = None, note: Callable[[], str] | None = None, phase: str = "",
        extra_tensors: Mapping[str, torch.Tensor] = {},
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.preview = preview
        self.note = note
        self.phase = phase and f"{phase}: "
        self.extra_tensors = extra_tensors
        self.picture: Image.Image | None = None
        self.bar = comfy.utils.ProgressBar(-(-config.steps // config.steps_per_iteration))
        self.losses: list[float] = []
        self.peak = PeakMemory(device)

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def progress(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        self.peak.update()
        config = self.config
        preview_due = config.preview_every and (step % config.preview_every == 0 or step == config.steps)
        if preview_due and self.preview is not None:
            self.picture = self._drawn() or self.picture
        shown = preview_due or step % max(1, config.steps // _UPDATES) == 0 or step == config.steps
        image = ("JPEG", self._card(), None) if shown else None
        self.bar.update_absolute(-(-step // config.steps_per_iteration), self.bar.total, image)
        if shown:
            recent = self.losses[-max(1, len(self.losses) // 10) :]
            mean = sum(recent) / len(recent)
            note = f", {self.note()}" if self.note is not None else ""
            logging.info("[Understudy] %sstep %s, loss %.4f%s", self.phase, config.counted(step), mean, note)

    def checkpoint(self, state: State) -> None:
        if self.checkpoints is not None:
            tensors = {**state.tensors, **self.extra_tensors}
            try:
                self.checkpoints.save(dataclasses.replace(state, tensors=tensors))
            except FAILURES as error:
                _warn(f"a checkpoint could not be written, and the training goes on: {told(error)}")

    def warn(self, line: str) -> None:
        tell("training", [line], logging.WARNING)

    def report_peak_memory(self) -> None:
        """Show on the node the most memory that the run used."""
        tell("training", [f"peak memory {self.peak.gigabytes:.2f} GB on {self.peak.device.type}"])

    def _drawn(self) -> Image.Image | None:
        """The preview, or None where there is no room, or where it fails: that ends previews, not the training."""
        try:
            picture = self.preview()
            if picture is None:
                _warn("a preview was left out, since the device has no room for it beside the training")
            return picture
        except FAILURES as error:
            self.preview = None
            _warn(f"a preview could not be drawn, and the training goes on without previews: {told(error)}")
            comfy.model_management.soft_empty_cache()
            return None

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


def told(error: BaseException) -> str:
    """What an error says, or else its kind."""
    return f"{error}".strip() or type(error).__name__


def _warn(line: str) -> None:
    tell("training", [line], logging.WARNING)


class PeakMemory:
    """The most memory in use so far: on a CUDA device that of its tensors, elsewhere that of the whole process."""

    def __init__(self, device: torch.device):
        self.device = device
        self._bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.update()

    def update(self) -> None:
        if self.device.type == "cuda":
            self._bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._bytes = max(self._bytes, psutil.Process().memory_info().rss)

    @property
    def gigabytes(self) -> float:
        return self._bytes / 2**30


def smoothed(losses: list[float]) -> list[float]:
    """An exponential moving average over about a twentieth of the run, for the curve."""
    share = 1 / max(1.0, len(losses) / 20)
    value, curve = losses[0], []
    for loss in losses:
        value += share * (loss - value)
        curve.append(value)
    return curve
