"""What benchmarks share: how they start, and times of calls that are made in turn."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher import environment, scripts

ROOT = scripts.ROOT
CHECKPOINT = ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"


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
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + warm_up):
        for name, call in calls.items():
            count = repeats(name)
            wait()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            wait()
            if round_ >= warm_up:
                times[name].append(1000 * (time.perf_counter() - begin) / count)
    return times
