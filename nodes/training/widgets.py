"""The inputs and outputs that Train and Save nodes share, and the run that their values ask for, said once each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..consent import widgets as consent_widgets
from ..files import publishing
from ..files.folders import WeightFolder
from ..files.kinds import LONGEST, MOST_TAGS
from ..fingerprint import clip_fingerprint, fingerprint
from ..inputs.checked import CheckedNode, File
from ..patching.changes import call_changes, weight_changes
from . import checkpoints
from .config import ADAMW, DTYPES, OPTIMIZERS, TrainingConfig

LORA_MODEL = io.Custom("LORA_MODEL")
LOSS_MAP = io.Custom("LOSS_MAP")

_MAX_SEED = 2**63 - 1
# The smallest rate that ComfyUI's frontend keeps: it rounds what is typed to the step.
_FINEST_RATE = 1e-7
# What a node counts in its own steps, each of which may be several optimiser steps.
_COUNTED = ("steps", "preview_every", "checkpoint_every")
# What decides the result; steps may be raised on resuming, and the rest changes no number.
_DECISIVE = ("seed", "batch_size", "learning_rate", "dtype", "min_snr_gamma")


def model(families: str = "") -> io.Model.Input:
    """The base model. `families` names those that the method supports, where it is not all."""
    supported = f" ({families})" if families else ""
    return io.Model.Input("model", tooltip=f"Base model to train on{supported}; it is not modified.")


def vae(encodes: str) -> io.Vae.Input:
    """The VAE of the pictures that are trained on, and of previews."""
    return io.Vae.Input("vae", tooltip=f"Encodes {encodes}, and decodes previews where memory allows.")


def steps(default: int, tooltip: str, most: int = 100_000) -> io.Int.Input:
    """The node's steps; each may be several optimiser steps."""
    return io.Int.Input("steps", default=default, min=1, max=most, tooltip=tooltip)


def learning_rate(default: float, note: str) -> io.Float.Input:
    """AdamW's step size."""
    return io.Float.Input(
        "learning_rate", default=default, min=_FINEST_RATE, max=0.1, step=_FINEST_RATE, round=False,
        tooltip=f"AdamW's learning rate. {note}",
    )


def lora_rank(default: int, note: str = "", **options: Any) -> io.Int.Input:
    """The rank of a LoRA of the base model."""
    return io.Int.Input(
        "rank", default=default, min=1, max=256, **options,
        tooltip=f"Rank of the LoRA: a higher one learns more and takes more memory.{note and f' {note}'}",
    )


def batch_size(default: int, tooltip: str, least: int = 1, most: int = 1024) -> io.Int.Input:
    """Samples per optimiser step."""
    return io.Int.Input("batch_size", default=default, min=least, max=most, tooltip=tooltip)


def seed(trained: str) -> io.Int.Input:
    """Fixed unless asked otherwise: a run can be resumed only under its own seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=_MAX_SEED, control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=f"Decides the initial weights, the noise and the order: the same seed trains the same {trained}.",
    )


def resume_from() -> File:
    """None, or a checkpoint on disk."""
    return File(
        "resume_from", options=checkpoints.choices(), default=checkpoints.NONE,
        tooltip="A checkpoint to continue from, of a run with the same settings. A run that is cancelled after its "
        "first step leaves one.",
    )


def dtype() -> io.Combo.Input:
    """What the model computes in; what is trained stays in fp32."""
    return io.Combo.Input(
        "dtype", options=list(DTYPES), default="model", optional=True, advanced=True,
        tooltip="What the model computes in. model is its own type, with bf16 or fp32 in place of fp16.",
    )


def optimizer() -> io.Combo.Input:
    """For trainings of matrices alone."""
    return io.Combo.Input(
        "optimizer", options=list(OPTIMIZERS), default=ADAMW, optional=True, advanced=True,
        tooltip="What makes a step of the gradients. Muon, in PyTorch 2.9 or later, gives all directions of a matrix "
        "one length; its learning_rate is of AdamW's size or more.",
    )


def min_snr_gamma() -> io.Float.Input:
    """For models that predict noise or v."""
    return io.Float.Input(
        "min_snr_gamma", default=0.0, min=0.0, max=100.0, step=0.5, optional=True, advanced=True,
        tooltip="Min-SNR weighting: 0 is off, 5 is the published value. Lower values down-weight low noise levels, "
        "which decide colours rather than poses.",
    )


def on_the_way(unit: str, picture: str = "") -> list[io.Input]:
    """Less memory for more time, previews and checkpoints. `unit` is what the node calls a step, plural and
    capitalised; `picture` says what a preview shows, if there are any.
    """
    checkpointing = io.Boolean.Input(
        "gradient_checkpointing", default=False, optional=True, advanced=True,
        tooltip="Computes each block twice to save memory: slower, but fits smaller cards.",
    )
    previews = io.Int.Input(
        "preview_every", default=0, min=0, max=100_000, optional=True, advanced=True,
        tooltip=f"{unit} between preview pictures of {picture}, always from the same noise; 0 turns previews off.",
    )
    checkpoints = io.Int.Input(
        "checkpoint_every", default=100, min=0, max=100_000, optional=True, advanced=True,
        tooltip=f"{unit} between checkpoints on disk; 0 saves one only when the run is cancelled.",
    )
    return [checkpointing, *([previews] if picture else []), checkpoints]


def masks(each: str) -> list[io.Input]:
    """Where the loss looks; `each` says how many masks there are."""
    return [
        io.Mask.Input(
            "masks", optional=True,
            tooltip=f"Where to learn from, {each}: white counts in full, black as mask_floor says. Without masks "
            "everything counts.",
        ),
        io.Float.Input(
            "mask_floor", default=0.0, min=0.0, max=1.0, step=0.01, round=False, optional=True, advanced=True,
            tooltip="How much counts outside the masks: 0 nothing, 1 as much as inside. No effect without masks.",
        ),
    ]


def offload(
    what: str = "the model's weights", whom: str = "cards that the model does not fit on"
) -> io.Boolean.Input:
    """Weights in main memory."""
    return io.Boolean.Input(
        "offload", default=False, optional=True, advanced=True,
        tooltip=f"Leaves {what} in main memory and streams them in layer by layer: much slower, for {whom}.",
    )


consent = consent_widgets.to_train  # of every Train node


def whole_unet(default: bool, note: str, **options: Any) -> io.Boolean.Input:
    """All weights in place of a LoRA."""
    return io.Boolean.Input(
        "whole_unet", default=default, **options,
        tooltip="Trains all weights of the UNet, as published, instead of a LoRA: 16 more bytes of memory per "
        f"weight, 14 GB for SD 2.1, and a file of 3.5 GB. {note}",
    )


class SaveNode(CheckedNode):
    """A node that writes to `FOLDER`; whether it can is known before anything runs, so before a training."""

    FOLDER: WeightFolder

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return publishing.obstacle(cls.FOLDER.name, filename_prefix) or True


def save_schema(
    node_id: str, display_name: str, category: str, *inputs: io.Input, prefix: str, folder: WeightFolder,
    options: Sequence[io.Input] = (), **texts: Any,
) -> io.Schema:
    """A Save node's: `inputs` are written to `folder`, under a name that begins with `prefix` where none is typed."""
    preview = io.Image.Input(
        "preview", optional=True,
        tooltip="A picture to save beside the file, for Identity Library, ComfyUI's model browser and model "
        "managers: the first of a batch, at most 512 pixels a side.",
    )
    made = [
        io.String.Input(
            "tags", default="", optional=True, advanced=True,
            tooltip="Words by which Identity Library and model managers show the file, separated by commas: at most "
            f"{MOST_TAGS}, of up to {LONGEST} characters each.",
        ),
        io.String.Input(
            "author", default="", optional=True, advanced=True,
            tooltip=f"Who made it, a name or a pseudonym of up to {LONGEST} characters; whoever has the file can "
            "read it. Empty: nobody is named.",
        ),
    ]
    filename_prefix = io.String.Input(
        "filename_prefix", default=prefix,
        tooltip=f"Name in output/{folder.name}, with folders if you like. A number is added; nothing is replaced.",
    )
    return io.Schema(
        node_id, display_name, category, outputs=[],
        inputs=[*inputs, filename_prefix, *options, consent_widgets.to_save(), preview, *made], is_output_node=True,
        **texts,
    )


def loss_map() -> io.Output:
    """The loss of every optimiser step."""
    return LOSS_MAP.Output(display_name="loss_map", tooltip="Connect it to Plot Loss Graph.")


def config(values: dict[str, Any], steps_per_iteration: int = 1, **fixed: Any) -> TrainingConfig:
    """The run that a node's values ask for, with so many optimiser steps for each step of the node.

    Optional inputs that a saved workflow lacks have their defaults. `fixed` goes to TrainingConfig as it is.
    """
    chosen = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(TrainingConfig)}
    for name in _COUNTED:
        chosen[name] *= steps_per_iteration
    return TrainingConfig(**{**chosen, "steps_per_iteration": steps_per_iteration, **fixed})


def settings(values: dict[str, Any], config: TrainingConfig, method: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one that it continues: the model and the text encoder, with all that
    changes what they compute, the config, the method's settings.
    """
    shared: dict[str, Any] = {}
    if "model" in values:
        shared |= {"model": fingerprint(values["model"]), **_changes("the model", values["model"])}
    if "clip" in values:
        clip = values["clip"]
        shared |= {"clip": clip_fingerprint(clip), "CLIP skip": clip.layer_idx, **_changes("clip", clip.patcher)}
    return {**shared, **{name: getattr(config, name) for name in _DECISIVE}, **method}


def _changes(what: str, patcher: Any) -> dict[str, str]:
    """What lies on a model since its file was loaded, where there is any."""
    found = {f"LoRAs on {what}": weight_changes(patcher), f"patches on {what}": call_changes(patcher)}
    return {name: digest for name, digest in found.items() if digest}
