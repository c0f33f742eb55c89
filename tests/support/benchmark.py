"""What benchmarks share: how they start, times of calls that are made in turn, and what they report."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import environment, scripts

ROOT = scripts.ROOT
CHECKPOINT = ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"


class WrongResultError(Exception):
    """A result differs from the definition by more than it may, so that its speed says nothing."""


def start(as_script: bool) -> None:
    """Enter the environment where this is a script, then make the pack and ComfyUI importable."""
    if as_script:
        environment.enter(ROOT)
    scripts.alias_pack()
    import torch  # only there is it installed

    start.base = tempfile.TemporaryDirectory(prefix="understudy-benchmark-")
    scripts.add_comfy_path(Path(start.base.name), cpu=not torch.cuda.is_available())


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, device, repeats: Callable[[str], int] = lambda name: 1,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the mean of repeats(name) times, after `warm_up` rounds."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(name: str) -> float:
        count = repeats(name)
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            calls[name]()
        wait()
        return 1000 * (time.perf_counter() - begin) / count

    return in_turn(calls, timed, rounds, warm_up)


def in_turn(
    names: Sequence[str] | Mapping[str, Any], measure: Callable[[str], float], rounds: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """measure(name) of each in each round, so that drift affects all equally, without the first `warm_up` rounds."""
    values: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + warm_up):
        for name in names:
            value = measure(name)
            if round_ >= warm_up:
                values[name].append(value)
    return values


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of the two in each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclasses.dataclass
class Report:
    """Where a part of tests/benchmarks/run.py measures, and what it finds: each figure and note is sent at once.

    `small` is for a CPU: shapes that take seconds, whose figures decide nothing.
    """

    device: Any
    dtype: Any
    small: bool
    rounds: int
    send: Callable[[dict[str, Any]], None]

    def figure(
        self, name: str, values: Sequence[float], shape: str, unit: str = "", goal: str = "",
        counted: float | None = None, least: bool = False,
    ) -> None:
        """A figure of all rounds. `goal` is "≤ 1.02" or "≥ 1.3", `counted` the value by arithmetic, below which
        nothing can be if it is the `least`.
        """
        self.send({
            "name": name, "values": [float(value) for value in values], "shape": shape, "unit": unit, "goal": goal,
            "counted": counted, "least": least, "decides": bool(goal) and not self.small,
        })

    def times(self, shape: str, times: Mapping[str, Sequence[float]]) -> None:
        for name, values in times.items():
            self.figure(name, values, shape, "ms")

    def note(self, text: str) -> None:
        """A line that holds no figure."""
        self.send({"note": text})

    def check(self, name: str, out, expected, limit: float) -> None:
        """Raises WrongResultError unless the norm of the difference over that of what is expected is within it."""
        out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
        difference = float((out - expected).norm() / expected.norm())
        self.send({"check": name, "difference": difference, "limit": limit})
        if not difference <= limit:  # NaN is not either
            raise WrongResultError(f"{name} differs from the definition by {difference:.1e}, more than {limit:g}")
