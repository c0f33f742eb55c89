"""Trainings of arms by the pack's own training code, kept between runs, and gone on with after a kill.

A constant learning rate depends on no end, so a training's state after 600 steps is what a training of 600 steps
leaves: a longer one begins there, and rates that were compared over few steps cost the chosen one nothing. Where the
rate falls, the settings hold the steps, and there are no stops on the way.
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
    run = f"{name}_{report.fingerprint(folder.name, settings)}"  # the folder's name has the models' digests
    for stop in [*(stop for stop in sorted(stops) if stop < steps), steps]:
        path = folder / f"{run}_{stop}.safetensors"
        if not path.exists():
            resumed, step = latest(run)
            print(f"training {name} from step {step} to {stop}: {settings}", flush=True)
            before = time.process_time()
            tensors, metadata = train(stop, checkpoints.Checkpoints(run, {"settings": repr(settings)}), resumed)
            metadata |= {"seconds": f"{time.process_time() - before:.3f}", "steps": str(stop), "from": str(step)}
            content = safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)
            report.replace(path, content)
    with safe_open(str(path), "pt") as file:
        return safetensors.torch.load_file(path), file.metadata()


def latest(run: str) -> tuple[str, int]:
    """The checkpoint that a run goes on from, and its steps; "none" and 0 where there is none."""
    steps = {checkpoints.NONE: 0}
    for choice in checkpoints.choices():  # two, where a run was killed before it had deleted the earlier one
        if choice.startswith(f"{run}_"):
            with safe_open(str(checkpoints.FOLDER.find(choice)), "pt") as file:
                steps[choice] = int(file.metadata()["step"])
    return max(steps.items(), key=lambda item: item[1])


def cost(metadata: dict[str, str]) -> float:
    """CPU seconds of a step, of the last part that was trained in one go, with what it encoded first."""
    return float(metadata["seconds"]) / max(1, int(metadata["steps"]) - int(metadata["from"]))
