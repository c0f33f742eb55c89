"""The inputs that every Train node has, and what a run reads of them; said once, so that all nodes say the same."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..fingerprint import fingerprint, patches_fingerprint
from . import checkpoints
from .config import DTYPES, TrainingConfig

_MAX_SEED = 2**63 - 1
# The smallest rate that the host's frontend keeps: it rounds what is typed to the step.
_FINEST_RATE = 1e-7
# What decides what is learnt; steps may be raised, and the rest changes no number.
_SHARED = ("seed", "batch_size", "learning_rate", "dtype", "min_snr_gamma")


def learning_rate(default: float, tooltip: str) -> io.Float.Input:
    """AdamW's step size."""
    return io.Float.Input(
        "learning_rate", default=default, min=_FINEST_RATE, max=0.1, step=_FINEST_RATE, round=False, tooltip=tooltip
    )


def seed(learnt: str) -> io.Int.Input:
    """Fixed unless asked otherwise: a run can be resumed only under its own seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=_MAX_SEED, control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=f"Decides the start, the noise and the order: the same seed trains the same {learnt}.",
    )


def resume_from() -> io.Combo.Input:
    """None, or a checkpoint on disk."""
    return io.Combo.Input(
        "resume_from", options=checkpoints.choices(), default=checkpoints.NONE,
        tooltip="A checkpoint of a run with the same settings to go on from. A run leaves one when it is cancelled, "
        "once its steps have begun.",
    )


def dtype() -> io.Combo.Input:
    """What the model computes in; what is trained stays in fp32."""
    return io.Combo.Input(
        "dtype", options=list(DTYPES), default="model", optional=True, advanced=True,
        tooltip="What the model computes in. model is its own type, but bf16 or fp32 instead of fp16.",
    )


def min_snr_gamma() -> io.Float.Input:
    """For models that predict noise or v."""
    return io.Float.Input(
        "min_snr_gamma", default=0.0, min=0.0, max=100.0, step=0.5, optional=True, advanced=True,
        tooltip="Min-SNR weighting of the noise levels: 0 is off, 5 the published value. The lower, the less do low "
        "levels count, which show colours rather than poses.",
    )


def gradient_checkpointing() -> io.Boolean.Input:
    """Memory for time."""
    return io.Boolean.Input(
        "gradient_checkpointing", default=False, optional=True, advanced=True,
        tooltip="Computes blocks twice in order to save memory: slower, with less memory.",
    )


def checkpoint_every(unit: str) -> io.Int.Input:
    """`unit` is what a step of the node is called, in the plural, capitalised."""
    return io.Int.Input(
        "checkpoint_every", default=100, min=0, max=100_000, optional=True, advanced=True,
        tooltip=f"{unit} between checkpoints on disk; 0 is only when the run is cancelled.",
    )


def config(given: dict, turns: int = 1, **more) -> TrainingConfig:
    """A run as these inputs ask for it, `turns` optimiser steps for each step of the node.

    Optional inputs that a saved workflow lacks have their defaults. `more` goes to TrainingConfig as it is.
    """
    return TrainingConfig(
        steps=given["steps"] * turns,
        learning_rate=given["learning_rate"],
        seed=given["seed"],
        dtype=given.get("dtype", "model"),
        gradient_checkpointing=given.get("gradient_checkpointing", False),
        checkpoint_every=given.get("checkpoint_every", 100) * turns,
        **more,
    )


def settings(given: dict[str, Any], config: TrainingConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from: the model, if any, the config's, the node's own."""
    model = {"model": fingerprint(given["model"])} if "model" in given else {}
    if model and (patches := patches_fingerprint(given["model"])):
        model["LoRAs on the model"] = patches
    return {**model, **{name: getattr(config, name) for name in _SHARED}, **own}
