"""A run's state on disk: one safetensors file a run, renewed as it goes on, listed by `resume_from`."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch

from ..files import weights
from ..files.folders import WeightFolder
from ..files.names import EXTENSION, refused
from .loop import State

FOLDER = WeightFolder("training_checkpoints", (EXTENSION,))
NONE = "none"
_KIND = "understudy training checkpoint"
# A text as inputs.digest makes it, which tells a reader nothing but that two differ; a seed may have as many digits.
_DIGEST = re.compile("[0-9a-f]{16}")


def choices() -> list[str]:
    """What `resume_from` offers: "none" and every checkpoint, the newest last."""
    return [NONE, *FOLDER.choices()]


class Checkpoints:
    """The file of one run. `settings` are plain values that say what was trained, compared on resuming."""

    def __init__(self, name: str, settings: dict):
        self.name = name
        self.settings = settings
        self.path: Path | None = None

    def save(self, state: State) -> None:
        """Write the state, then delete the one before it: a whole file stands at any moment."""
        tensors = {**state.tensors, "losses": torch.tensor(state.losses, dtype=torch.float64)}
        metadata = {
            "kind": _KIND, "run": self.name, "step": str(state.step), "settings": json.dumps(self.settings),
        }
        before = self.path
        self.path = weights.save(tensors, metadata, FOLDER.name, self.name)
        if before is not None:
            before.unlink(missing_ok=True)
        logging.info("[Understudy] checkpoint %s after optimiser step %d", self.path.name, state.step)

    def resume(self, name: str) -> State | None:
        """The state of a listed checkpoint, or None for "none".

        Raises WeightFileError for another kind of file; ValueError for another node's checkpoint and, naming the
        settings, for one that was made with others than this run's.
        """
        if name == NONE:
            return None
        path = FOLDER.find(name)
        tensors, metadata = weights.read(path)
        if metadata.get("kind") != _KIND or "losses" not in tensors:
            raise refused(path, "is no training checkpoint", "Choose one that a Train node of this pack wrote")
        # Those from before it was written down are compared by their settings.
        if (run := metadata.get("run", self.name)) != self.name:
            raise ValueError(
                f"{name} is a checkpoint of another training, {run}: choose one of this node, whose names begin with "
                f"{self.name}, or set resume_from to {NONE}"
            )
        made_with = json.loads(metadata["settings"])
        differing = [
            f"different {key}" if any(isinstance(v, str) and _DIGEST.fullmatch(v) for v in (there, here))
            else f"{key} {there!r} and this run has {here!r}"
            for key in sorted(self.settings.keys() | made_with.keys())
            if (here := self.settings.get(key)) != (there := made_with.get(key))
        ]
        if differing:
            raise ValueError(
                f"{name} was made with {'; '.join(differing)}: set it as it was, or set resume_from to {NONE}"
            )
        return State(int(metadata["step"]), tensors.pop("losses").tolist(), tensors)
