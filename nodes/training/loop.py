"""The one training loop: seeded, cancellable, resumed bit for bit, and stopped by the first value that is not finite.

It knows neither ComfyUI nor a model: a method gives it the trainable parameters and an objective, inside a session
that has made the model differentiable.
"""

import collections
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..errors import shown_by_name
from .config import ADAMW, MUON, TrainingConfig
from .parallel import engine
from .seeds import seed_for

# objective(step, generator) -> scalar loss with a graph to the parameters
Objective = Callable[[int, torch.Generator], torch.Tensor]
Parameters = dict[str, torch.nn.Parameter]
# masks() -> by parameter name, True where the step whose gradient was just computed may change the parameter
Masks = Callable[[], dict[str, torch.Tensor]]
_MOMENTS = {ADAMW: ("step", "exp_avg", "exp_avg_sq"), MUON: ("momentum_buffer",)}  # PyTorch's names
_NORMS = 100  # ours: steps whose gradient norms are remembered


@shown_by_name
class TrainingDiverged(RuntimeError):
    """A loss or a gradient that is not finite, at the step that the message names; no checkpoint of it is saved."""


@dataclass
class State:
    """All that a run needs to continue: finished steps, their losses, and parameters and their moments by name."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Paths:
    """Parts of what is trained: of each the parameters' names, and factors on the learning rate where it is not 1.

    `clip_each` clips each part's gradient to the norm, and not that of all together. `norms` are each part's in the
    latest steps, before clipping.
    """

    parts: dict[str, list[str]]
    factors: dict[str, float] = field(default_factory=dict)
    clip_each: bool = False
    norms: collections.deque[list[float]] = field(default_factory=lambda: collections.deque(maxlen=_NORMS))

    def groups(self, parameters: Parameters) -> dict[str, Parameters]:
        """The parameters of each part. Raises KeyError for one that is in none, or in no training."""
        groups = {part: {name: parameters[name] for name in names} for part, names in self.parts.items()}
        if left := parameters.keys() - {name for group in groups.values() for name in group}:
            raise KeyError(f"parameters of no path: {sorted(left)}")
        return groups

    def medians(self) -> dict[str, float]:
        """Of each part the median norm of its gradient in the latest steps."""
        return dict(zip(self.parts, map(statistics.median, zip(*self.norms, strict=True)), strict=True))


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
    resume: State | None = None, masks: Masks | None = None, fixed_norm: bool = False, paths: Paths | None = None,
) -> list[float]:
    """Train `parameters` in place for `config.steps` steps and return every step's loss.

    Where `masks` are False a step changes neither the parameter nor AdamW's moments of it, and an element's moments
    are corrected for their bias by the number of steps that moved it. With `fixed_norm` a step turns what it moves of
    each vector, along the last dimension, and leaves its length. `paths` have learning rates of their own, without
    `masks`. Masks are AdamW's.

    Random numbers come only from the generator that the objective is called with. Raises TrainingDiverged; anything
    else that stops the run leaves a checkpoint of the last finished step.
    """
    if masks is not None and config.optimizer != ADAMW:
        raise ValueError(f"masks restrict steps of AdamW, and optimizer is {config.optimizer}")
    paths = paths or Paths({"": list(parameters)})
    groups = [
        {"params": list(group.values()), "factor": paths.factors.get(part, 1.0)}
        for part, group in paths.groups(parameters).items()
    ]
    optimiser = _optimiser(groups, config)
    state = State() if resume is None else resume
    if state.step:
        _restore(state, parameters, optimiser, config)
    objective, optimiser = engine().prepared(objective, parameters, optimiser)
    losses = list(state.losses)
    saved_steps = state.step
    try:
        while len(losses) < config.steps:
            monitor.check()
            losses.append(_one_step(len(losses), objective, optimiser, parameters, config, masks, fixed_norm, paths))
            monitor.progress(len(losses), losses[-1])
            if config.checkpoint_every and len(losses) % config.checkpoint_every == 0:
                saved_steps = len(losses)
                _checkpoint(monitor, losses, parameters, optimiser)
        saved_steps = len(losses)
        _warn_if_degraded(losses, config, monitor)
    except TrainingDiverged:
        saved_steps = len(losses)
        raise
    finally:
        # Cancelled, out of memory, ...: a step that did not finish has not changed a parameter.
        if len(losses) > saved_steps:
            _checkpoint(monitor, losses, parameters, optimiser)
    return losses


def _optimiser(groups: list[dict], config: TrainingConfig) -> torch.optim.Optimizer:
    """The config's, as PyTorch ships it."""
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == ADAMW:
        return torch.optim.AdamW(groups, **common)
    return torch.optim.Muon(groups, **common, adjust_lr_fn="match_rms_adamw")


def _one_step(step, objective, optimiser, parameters, config, masks, fixed_norm, paths) -> float:
    optimiser.zero_grad(set_to_none=True)
    for group in optimiser.param_groups:
        group["lr"] = config.learning_rate_at(step) * group["factor"]
    seed = seed_for(config.seed, "step", step)
    value = engine().gradients(objective, step, lambda: torch.Generator().manual_seed(seed))
    if not math.isfinite(value):
        raise TrainingDiverged(_divergence("loss", value, step, config))
    norm = _clipped(parameters, config.max_gradient_norm, paths)
    if not math.isfinite(norm):
        raise TrainingDiverged(_divergence("gradient", norm, step, config))
    found = {} if masks is None else masks()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()} if fixed_norm else {}
    if masks is None:
        optimiser.step()
    else:
        _masked_step(optimiser, parameters, found)
    for name, old in before.items():
        _turn(parameters[name], old, found.get(name))
    return value


def _clipped(parameters: Parameters, most: float, paths: Paths) -> float:
    """Clip the gradients to the norm `most`, and return what theirs was, of all parts together."""
    if len(paths.parts) == 1:
        return engine().clipped(parameters, most)
    groups = paths.groups(parameters).values()
    if paths.clip_each:
        norms = [engine().clipped(group, most) for group in groups]
    else:
        norms = [
            float(torch.nn.utils.get_total_norm([p.grad for p in group.values() if p.grad is not None]))
            for group in groups
        ]
        engine().clipped(parameters, most)
    paths.norms.append(norms)
    return math.hypot(*norms)


@torch.no_grad()
def _masked_step(optimiser: torch.optim.AdamW, parameters: Parameters, masks: dict[str, torch.Tensor]) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) where a mask is True, with a count of steps for each element.

    PyTorch's own has one count for all: an element that is rarely free would move too far each time that it is.
    """
    (group,) = optimiser.param_groups
    rate, (first, second) = group["lr"], group["betas"]
    for name, mask in masks.items():
        parameter, state = parameters[name], optimiser.state[parameters[name]]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            # A checkpoint of an earlier version holds one count for all.
            state[key] = state.get(key, torch.zeros_like(parameter)).to(parameter).expand_as(parameter)
        count = state["step"] + mask
        mean = torch.lerp(state["exp_avg"], parameter.grad, 1 - first)
        square = torch.lerp(state["exp_avg_sq"], parameter.grad.square(), 1 - second)
        # 1 - beta ** count, without what fp32 would lose.
        first_bias, second_bias = (-torch.expm1(count * math.log(beta)) for beta in (first, second))
        length = (square / second_bias).sqrt() + group["eps"]
        moved = parameter * (1 - rate * group["weight_decay"]) - rate * mean / first_bias / length
        state["step"] = count
        state["exp_avg"] = torch.where(mask, mean, state["exp_avg"])
        state["exp_avg_sq"] = torch.where(mask, square, state["exp_avg_sq"])
        parameter.copy_(torch.where(mask, moved, parameter))


@torch.no_grad()
def _turn(parameter: torch.Tensor, before: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Give what a step moved of each vector [..., D] the length that it had: the whole vector keeps its own."""
    free = torch.ones_like(parameter, dtype=torch.bool) if mask is None else mask
    length = (before * free).norm(dim=-1, keepdim=True)
    now = (parameter * free).norm(dim=-1, keepdim=True)
    scale = torch.where(now > 0, length / now, torch.ones_like(now))
    parameter.copy_(torch.where(free, parameter * scale, parameter))


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


def _checkpoint(monitor: Monitor, losses, parameters, optimiser) -> None:
    """Give the monitor a copy of the run's state, or a warning where there is no memory for one; the run goes on."""
    if not engine().main:  # the others hold the same state
        return
    try:
        state = _snapshot(losses, parameters, optimiser)
    except (MemoryError, RuntimeError) as error:  # PyTorch's own, on any device, are RuntimeErrors
        reason = f"{error}".strip() or "out of memory"
        monitor.warn(f"the state could not be copied for a checkpoint, and the training goes on: {reason}")
    else:
        monitor.checkpoint(state)


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
            moments = {key: state.tensors.get(f"{key}.{name}") for key in _MOMENTS[config.optimizer]}
            optimiser.state[parameter] = {
                # PyTorch's AdamW keeps its one count on the CPU.
                key: value.clone() if key == "step" and not value.ndim else value.to(parameter, copy=True)
                for key, value in moments.items()
                if value is not None
            }
