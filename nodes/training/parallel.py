"""Several processes that train one thing: each computes its shares of every step, and all make the same steps.

In a node a training runs in one process, by `Engine` itself. `workflows/train.py` puts an engine in its place that
knows the other processes. It imports no ComfyUI.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# compute(part) -> the losses [n] of the samples of a batch that `part` names
Compute = Callable[[slice], torch.Tensor]
Generators = Callable[[], torch.Generator]


@dataclass(frozen=True)
class Share:
    """Number `index` of `count` parts of each batch, which is drawn whole, with its noise, by every process."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """Which samples of a batch of `size` it has; none where there are more shares than samples."""
        return slice(self.index * size // self.count, (self.index + 1) * size // self.count)


_share: contextvars.ContextVar[Share] = contextvars.ContextVar("share", default=Share())


def share() -> Share:
    """The share that an objective is to compute now."""
    return _share.get()


@contextlib.contextmanager
def computing(part: Share) -> Iterator[None]:
    """Objectives that are called inside this block compute only this share."""
    token = _share.set(part)
    try:
        yield
    finally:
        _share.reset(token)


def in_shares(size: int, compute: Compute) -> torch.Tensor:
    """The losses [size] of a batch, with 0 for those that other shares compute.

    So the gradients of a mean of them, summed over the shares, are those of the mean over the whole batch.
    """
    part = share().of(size)
    if part.start == part.stop:  # its gradients are 0, but they exist, as they do in the other processes
        return 0 * compute(slice(0, 1)).expand(size)
    return torch.nn.functional.pad(compute(part), (part.start, size - part.stop))


class Engine:
    """One process that computes whole batches. Others override it."""

    processes = 1
    accumulation = 1  # shares that a process computes one after the other in a step
    main = True  # whether this process writes files and shows progress

    def prepared(self, objective: Any, parameters: dict, optimiser: Any) -> tuple[Any, Any]:
        """Objective and optimiser for the calls below; the parameters stay the same objects."""
        return objective, optimiser

    def gradients(self, objective: Any, step: int, generators: Generators) -> float:
        """Add the gradients of a step, of all processes, to the parameters, and return its loss.

        Each share gets a generator of its own from `generators`, all with the same numbers. Where the loss is not
        finite the gradients mean nothing.
        """
        loss = objective(step, generators())
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        return value

    def clipped(self, parameters: dict[str, torch.nn.Parameter], norm: float) -> float:
        """Clip the gradients to this norm and return what it was."""
        return float(torch.nn.utils.clip_grad_norm_(parameters.values(), norm))

    def everyone(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows [n, D] of all processes in the order of their shares, with gradients back to each."""
        return rows

    def watched(self, monitor: Any) -> Any:
        """The monitor for this process."""
        return monitor

    def encoded(
        self, what: str, key: Callable[[], str], count: int, encode: Callable[[int], Any]
    ) -> Sequence[Any] | None:
        """encode(i), tensors by name or one tensor, for i below `count`, made once and shared by all processes.

        `key()` names all that decides them. None where there is nothing to share, and the caller encodes itself.
        """
        return None


_engine: contextvars.ContextVar[Engine | None] = contextvars.ContextVar("engine", default=None)
_ALONE = Engine()


def engine() -> Engine:
    """What runs the trainings of this process."""
    return _engine.get() or _ALONE


@contextlib.contextmanager
def driven_by(chosen: Engine) -> Iterator[None]:
    """Trainings inside this block are run by this engine."""
    token = _engine.set(chosen)
    try:
        yield
    finally:
        _engine.reset(token)


def check_shares(batch: int, samples: int) -> None:
    """Raise ValueError where a step of `batch` of these `samples` has too few for a part in every process."""
    driver = engine()
    parts = driver.processes * driver.accumulation
    divided = (
        f"a step is divided into {parts} parts, {driver.accumulation} in each of {driver.processes} processes, some "
        "of which would compute nothing"
    )
    fewer = "use fewer processes or less gradient accumulation"
    if batch < parts:
        raise ValueError(f"batch_size is {batch}, and {divided}: set batch_size to {parts} or more, or {fewer}")
    if samples < parts:
        raise ValueError(f"there are {samples} samples to train on, and {divided}: {fewer}, or add samples")


def largest_share(batch: int) -> int:
    """How many samples of a batch a process computes at once, where it has the most."""
    return -(-batch // (engine().processes * engine().accumulation))


def only_whole_batches(what: str, why: str) -> None:
    """Raise ValueError where batches are divided: `what` is trained by one process without accumulation, `why`."""
    driver = engine()
    if driver.processes > 1 or driver.accumulation > 1:
        raise ValueError(
            f"{what} is trained by one process, {why}, and here are {driver.processes} with {driver.accumulation} "
            "shares of a step each: start it with `python workflows/train.py`, without accelerate launch and without "
            "gradient accumulation"
        )


def check_contrast(batch: int) -> None:
    """Raise ValueError where a batch whose samples are compared with each other cannot be divided evenly."""
    driver = engine()
    if driver.accumulation > 1:
        raise ValueError(
            "the combiner compares all pairs of a step, so its gradients cannot be accumulated: set gradient "
            "accumulation to 1, and use more processes or a smaller batch_size"
        )
    if batch % driver.processes:
        raise ValueError(
            f"batch_size is {batch} for {driver.processes} processes, which compare their pairs in equal parts: use "
            f"a multiple of {driver.processes}"
        )
