"""Trainings of arms by the pack's own training code, kept between runs, and gone on with after a kill.

A training's constant learning rate depends on no end, so its state after 600 steps is what a training of 600 steps
leaves: a longer one begins there, and rates that were compared over few steps cost the chosen one nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pack.nodes import extension
from pack.nodes.training import checkpoints
from safetensors import safe_open

from . import report

CHECKPOINT_EVERY = 100  # steps that a kill costs at most

# train(steps, checkpoints, resume_from) -> (tensors, metadata)
Train = Callable[[int, checkpoints.Checkpoints, str], tuple[dict[str, torch.Tensor], dict[str, str]]]


def trained(
    folder: Path, name: str, settings: Any, steps: int, train: Train, stops: tuple[int, ...] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `train` leaves after so many steps, from its file or made now; `settings`, by repr, are all else of it.

    It is also kept after each of the `stops` before. The metadata has CPU `seconds`, of all threads, and `steps`.
    """
    extension.register_folders()
    run = f"{name}_{report.fingerprint(settings)}"
    done = 0
    for stop in [*(stop for stop in sorted(stops) if stop < steps), steps]:
        path = folder / f"{run}_{stop}.safetensors"
        if not path.exists():
            print(f"training {name} from step {done} to {stop}: {settings}", flush=True)
            before = time.process_time()
            tensors, metadata = train(stop, checkpoints.Checkpoints(run, {"settings": repr(settings)}), latest(run))
            metadata |= {"seconds": f"{time.process_time() - before:.1f}", "steps": str(stop), "from": str(done)}
            content = safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)
            report.replace(path, content)
        done = stop
    with safe_open(str(path), "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


def latest(run: str) -> str:
    """The checkpoint that a run goes on from, or "none"."""
    found = [choice for choice in checkpoints.choices() if choice.startswith(f"{run}_")]
    for older in found[:-1]:  # of a run that was killed before it could
        checkpoints.FOLDER.find(older).unlink()
    return found[-1] if found else checkpoints.NONE


def cost(metadata: dict[str, str]) -> float:
    """CPU seconds of a step, of the last part that was trained in one go."""
    return float(metadata["seconds"]) / max(1, int(metadata["steps"]) - int(metadata["from"]))
