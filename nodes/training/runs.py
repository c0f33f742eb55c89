"""A run of the training loop inside a node: watched, cancellable, checkpointed, and its peak memory reported.

A Train node's way: its values become a config (widgets.py) and its data lists of single items (inputs.py); the room's
training.py reads the checkpoint to resume, opens a session (session.py), makes the method's objective and parameters,
and calls `run`; what was trained goes to the room's files.py.
"""

import logging
from collections.abc import Callable, Mapping

import torch

from ..messages import tell
from . import doctor, loop
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .monitor import FAILURES, NodeMonitor, Preview, told
from .parallel import engine

# What ComfyUI's Plot Loss Graph takes, LOSS_MAP: the loss of every optimiser step.
LossMap = dict[str, list[float]]


def run(
    objective: loop.Objective, parameters: loop.Parameters, config: TrainingConfig, device: torch.device, *,
    checkpoints: Checkpoints | None = None, resume: loop.State | None = None, masks: loop.Masks | None = None,
    preview: Preview | None = None, note: Callable[[], str] | None = None, phase: str = "",
    extra_tensors: Mapping[str, torch.Tensor] = {}, fixed_norm: bool = False,
    reference_loss: Callable[[], float] | None = None, paths: loop.Paths | None = None,
) -> LossMap:
    """Train `parameters` in place, inside an open session, and report the peak memory on the node.

    `resume` is the state that checkpoints.resume read before the session loaded a model. A preparatory run has no
    `checkpoints`: it leaves none behind and reports no memory. `preview`, `note` and `phase` are shown as
    NodeMonitor shows them; `extra_tensors` are stored in each checkpoint; `masks`, `fixed_norm` and `paths` are
    loop.train's. `reference_loss` is called before the first step and after the last one, and the node compares both.
    Raises loop.TrainingDiverged and ComfyUI's interruption.
    """
    monitor = NodeMonitor(config, device, checkpoints, preview, note, phase, extra_tensors)
    before = _measured(reference_loss) if engine().main else None
    losses = loop.train(objective, parameters, config, engine().watched(monitor), resume, masks, fixed_norm, paths)
    after = None if before is None else _measured(reference_loss)
    if after is not None:
        finding = doctor.compared(before, after)
        tell("training", [finding.text], logging.WARNING if finding.serious else logging.INFO)
    if checkpoints is not None and engine().main:
        monitor.report_peak_memory()
    return {"loss": losses}


def _measured(reference_loss: Callable[[], float] | None) -> float | None:
    """The loss on the references; None where there is none, or where it fails: no result depends on it."""
    try:
        return None if reference_loss is None else reference_loss()
    except FAILURES as error:
        tell("training", [f"the loss on the references could not be measured: {told(error)}"], logging.WARNING)
        return None
