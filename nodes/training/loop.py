"""The one training loop: seeded, cancellable, resumed bit for bit, and stopped by the first value that is not finite.

It knows neither ComfyUI nor a model: a method gives it the trainable parameters and an objective, inside a session
that has made the model differentiable.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import shown_by_name
from .config import TrainingConfig
from .seeds import seed_for

# objective(step, generator) -> scalar loss with a graph to the parameters
Objective = Callable[[int, torch.Generator], torch.Tensor]
Parameters = dict[str, torch.nn.Parameter]
# masks() -> by parameter name, True where the step whose gradient was just computed may change the parameter
Masks = Callable[[], dict[str, torch.Tensor]]


@shown_by_name
class TrainingDiverged(RuntimeError):
    """A loss or a gradient that is not finite, at the step that the message names; no checkpoint of it is saved."""


@dataclass
class State:
    """All that a run needs to continue: finished steps, their losses, and parameters and AdamW's moments by name."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Monitor(Protocol):
    """What the loop reports to while it runs."""

    def check(self) -> None:
        """Called before every step; raises to stop the run."""

    def progress(self, step: int, loss: float) -> None:
        """`step` steps are done; `loss` is that of the last one."""

    def checkpoint(self, state: State) -> None:
        """A state to save: every `checkpoint_every` steps, and where the run is stopped between them."""

    def warn(self, line: str) -> None:
        """What makes the result doubtful, for the user."""


def train(
    objective: Objective, parameters: Parameters, config: TrainingConfig, monitor: Monitor,
    resume: State | None = None, masks: Masks | None = None,
) -> list[float]:
    """Train `parameters` in place for `config.steps` steps and return every step's loss.

    Where `masks` are False a step changes neither the parameter nor AdamW's moments of it.

    Random numbers come only from the generator that the objective is called with. Raises TrainingDiverged; anything
    else that stops the run leaves a checkpoint of the last finished step.
    """
    optimiser = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state = State() if resume is None else resume
    if state.step:
        _restore(state, parameters, optimiser, config)
    losses = list(state.losses)
    saved_steps = state.step
    try:
        while len(losses) < config.steps:
            monitor.check()
            losses.append(_one_step(len(losses), objective, optimiser, parameters, config, masks))
            monitor.progress(len(losses), losses[-1])
            if config.checkpoint_every and len(losses) % config.checkpoint_every == 0:
                saved_steps = len(losses)
                monitor.checkpoint(_snapshot(losses, parameters, optimiser))
        saved_steps = len(losses)
        _warn_if_degraded(losses, config, monitor)
    except TrainingDiverged:
        saved_steps = len(losses)
        raise
    finally:
        # Cancelled, out of memory, ...: a step that did not finish has not changed a parameter.
        if len(losses) > saved_steps:
            monitor.checkpoint(_snapshot(losses, parameters, optimiser))
    return losses


def _one_step(step, objective, optimiser, parameters, config, masks) -> float:
    optimiser.zero_grad(set_to_none=True)
    loss = objective(step, torch.Generator().manual_seed(seed_for(config.seed, "step", step)))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingDiverged(_divergence("loss", value, step, config))
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate_at(step)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_gradient_norm))
    if not math.isfinite(norm):
        raise TrainingDiverged(_divergence("gradient", norm, step, config))
    if masks is None:
        optimiser.step()
    else:
        _masked_step(optimiser, parameters, masks())
    return value


def _masked_step(optimiser, parameters: Parameters, masks: dict[str, torch.Tensor]) -> None:
    """A step of the optimiser, undone where a mask is False."""
    before = {}
    for name in masks:
        tensors = [parameters[name].detach(), *_moments(optimiser, parameters[name])]
        before[name] = [tensor.clone() for tensor in tensors]
    optimiser.step()
    for name, mask in masks.items():
        after = [parameters[name].detach(), *_moments(optimiser, parameters[name])]
        # Moments that did not exist before the first step were zero.
        old = before[name] + [torch.zeros_like(tensor) for tensor in after[len(before[name]) :]]
        for tensor, old_tensor in zip(after, old, strict=True):
            tensor.copy_(torch.where(mask, tensor, old_tensor))


def _moments(optimiser, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    state = optimiser.state[parameter]
    return [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]


def _divergence(what: str, value: float, step: int, config: TrainingConfig) -> str:
    return (
        f"the {what} became {value} at step {config.counted(step + 1)}, so training stopped and saved nothing "
        f"of it: lower learning_rate ({config.learning_rate:g}), or train in fp32"
    )


def _warn_if_degraded(losses: list[float], config: TrainingConfig, monitor: Monitor) -> None:
    """A warning where a finite loss rose to that of a model that has learned nothing: noise has a variance of 1."""
    last = statistics.median(losses[-max(1, len(losses) // 4) :])
    if last > 0.7 and last > 3 * losses[0]:
        monitor.warn(
            f"the loss rose from {losses[0]:.4f} to {last:.4f}, so the result is probably useless: lower "
            f"learning_rate ({config.learning_rate:g})"
        )


def _snapshot(losses, parameters, optimiser) -> State:
    tensors = {f"parameter.{name}": parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().clone()
    return State(len(losses), list(losses), tensors)


def _restore(state: State, parameters: Parameters, optimiser: torch.optim.Optimizer, config: TrainingConfig) -> None:
    if state.step > config.steps:
        raise ValueError(
            f"the checkpoint has done {state.step} optimiser steps and this run has only {config.steps}: raise steps"
        )
    for name, parameter in parameters.items():
        stored = state.tensors.get(f"parameter.{name}")
        if stored is None or stored.shape != parameter.shape:
            stored_shape = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
            raise ValueError(
                f"the checkpoint has {stored_shape} for {name}, where this run has shape {tuple(parameter.shape)}: "
                "resume with the model and the rank that it was saved with"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors[f"parameter.{name}"])
            moments = {key: state.tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter, copy=True)
                for key, value in moments.items()
                if value is not None
            }
