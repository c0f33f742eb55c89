"""A run's state on disk: one safetensors file per run, replaced as it proceeds, and listed by `resume_from`."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from ..files import weights
from ..files.folders import WeightFolder
from ..files.names import EXTENSION, refused
from ..messages import tell
from .config import ADAMW
from .loop import State

FOLDER = WeightFolder("training_checkpoints", (EXTENSION,))
NONE = "none"
_KIND = "understudy training checkpoint"
_BEFORE = {"decay": 0.0, "optimizer": ADAMW}  # of runs from before there was a choice
_SEEDS = "by purpose"  # how random numbers are drawn: others would not repeat the run that is continued
# A digest made by inputs.digest tells a reader only that two differ. A seed of as many digits is a number.
_DIGEST = re.compile("[0-9a-f]{16}")


def choices() -> list[str]:
    """What `resume_from` offers: "none" and every checkpoint, the newest last."""
    return [NONE, *FOLDER.choices()]


class Checkpoints:
    """The checkpoint file of one run. `settings` say in plain values what is trained; resuming compares them."""

    def __init__(self, name: str, settings: dict):
        self.name = name
        self.settings = settings
        self.path: Path | None = None

    def save(self, state: State) -> None:
        """Write the state, then delete the previous one, so that there is always a complete file."""
        tensors = {**state.tensors, "losses": torch.tensor(state.losses, dtype=torch.float64)}
        metadata = {
            "kind": _KIND, "run": self.name, "step": str(state.step), "settings": json.dumps(self.settings),
            "seeds": _SEEDS,
        }
        previous = self.path
        self.path = weights.save(tensors, metadata, FOLDER.name, self.name)
        logging.info("[Understudy] checkpoint %s after optimiser step %d", self.path.name, state.step)
        if previous is not None:
            try:
                previous.unlink(missing_ok=True)
            except OSError as error:  # another program has it open
                tell("training", [f"the earlier checkpoint {previous.name} stays: {error}"], logging.WARNING)

    def resume(self, name: str) -> State | None:
        """The state in a listed checkpoint, or None for "none".

        Raises WeightFileError for another kind of file; ValueError for the checkpoint of another node and, naming
        the settings that differ, for one of another run.
        """
        if name == NONE:
            return None
        path = FOLDER.find(name)
        tensors, metadata = weights.read(path)
        if metadata.get("kind") != _KIND or "losses" not in tensors:
            raise refused(path, "is not a training checkpoint", "Choose one that a Train node of this pack wrote")
        if metadata.get("seeds") != _SEEDS:
            raise ValueError(
                f"{name} is from an earlier version of this node, which drew other random numbers, so this run "
                f"cannot continue it: set resume_from to {NONE} and train again"
            )
        if (run := metadata["run"]) != self.name:
            raise ValueError(
                f"{name} is a checkpoint of another training, {run}: choose one of this node, whose name begins with "
                f"{self.name}, or set resume_from to {NONE}"
            )
        stored_settings = json.loads(metadata["settings"])
        differing = [
            _difference(key, stored, current)
            for key in sorted(self.settings.keys() | stored_settings.keys())
            if (stored := stored_settings.get(key, _BEFORE.get(key))) != (current := self.settings.get(key))
        ]
        if differing:
            raise ValueError(
                f"{name} was made with {'; '.join(differing)}: set it as it was, or set resume_from to {NONE}"
            )
        return State(int(metadata["step"]), tensors.pop("losses").tolist(), tensors)


def _difference(key: str, stored: Any, current: Any) -> str:
    if any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (stored, current)):
        return f"different {key}"
    if current is None:
        return f"{key} {stored!r}, unset in this run"
    if stored is None:
        return f"{key} unset and this run has {current!r}"
    return f"{key} {stored!r} and this run has {current!r}"
