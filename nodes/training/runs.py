"""A run of the training loop inside a node: watched, cancellable, checkpointed, and its peak memory reported.

A Train node's way: its values become a config (widgets.py) and its data lists of single items (inputs.py); the room's
training.py reads the checkpoint to resume, opens a session (session.py), makes the method's objective and parameters,
and calls `run`; what was trained goes to the room's files.py.
"""

from collections.abc import Callable, Mapping

import torch

from . import loop
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .monitor import NodeMonitor, Preview

# What ComfyUI's Plot Loss Graph takes, LOSS_MAP: the loss of every optimiser step.
LossMap = dict[str, list[float]]


def run(
    objective: loop.Objective, parameters: loop.Parameters, config: TrainingConfig, device: torch.device, *,
    checkpoints: Checkpoints | None = None, resume: loop.State | None = None, masks: loop.Masks | None = None,
    preview: Preview | None = None, note: Callable[[], str] | None = None, phase: str = "",
    extra_tensors: Mapping[str, torch.Tensor] = {}, fixed_norm: bool = False,
) -> LossMap:
    """Train `parameters` in place, inside an open session, and report the peak memory on the node.

    `resume` is the state that checkpoints.resume read before the session loaded a model. A preparatory run has no
    `checkpoints`: it leaves none behind and reports no memory. `preview`, `note` and `phase` are shown as
    NodeMonitor shows them; `extra_tensors` are stored in each checkpoint; `masks` and `fixed_norm` are loop.train's.
    Raises loop.TrainingDiverged and ComfyUI's
    interruption.
    """
    monitor = NodeMonitor(config, device, checkpoints, preview, note, phase, extra_tensors)
    losses = loop.train(objective, parameters, config, monitor, resume, masks, fixed_norm)
    if checkpoints is not None:
        monitor.report_peak_memory()
    return {"loss": losses}
