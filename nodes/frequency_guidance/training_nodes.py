"""Node of frequency guidance's fine-tuning (ImPoster): trains on one source and one driving picture."""

import logging

from comfy_api.latest import io

from ..consent import gate
from ..inputs.checked import CheckedNode
from ..messages import tell
from ..training import doctor, inputs, loss_masks, picture_training, widgets
from ..training.checkpoints import Checkpoints
from ..training.config import LoraConfig, TrainingConfig
from . import training
from .config import HIGHEST_WHOLE_UNET_LEARNING_RATE, SourceDrivingPairConfig
from .nodes import CATEGORY

_DEFAULT = SourceDrivingPairConfig()
_PICTURES = ("source", "driving")
_NOT_SAVED = "the LoRA's file will hold no consent record: Save LoRA Weights is ComfyUI's, and keeps none"


class UnderstudyTrainSourceDrivingPair(CheckedNode):
    """Trains a LoRA, or the whole UNet, on one source and one driving picture, each with its text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainSourceDrivingPair", display_name="Train Source and Driving Pair (ImPoster)",
            category=CATEGORY,
            description="Trains on one source and one driving picture, so that their texts mean just these two. "
            "Frequency guidance and the prompt switch then put the action on the source.",
            search_aliases=[
                "ImPoster", "train LoRA", "fine-tune", "action transfer", "DreamBooth",
                "motion transfer", "動作", "动作",
            ],
            is_input_list=True,
            inputs=[
                widgets.model(),
                io.Clip.Input("clip", tooltip="Encodes the two texts. It is not trained."),
                widgets.vae("the two pictures"),
                io.Image.Input("source", tooltip="One picture of the subject, at the size to generate."),
                io.String.Input(
                    "source_text", multiline=True, tooltip="What the source picture shows: subject, action, place."
                ),
                io.Image.Input("driving", tooltip="One picture of the action, at the size to generate."),
                io.String.Input(
                    "driving_text", multiline=True, tooltip="What the driving picture shows: subject, action, place."
                ),
                widgets.steps(
                    _DEFAULT.steps,
                    "Iterations; each is one optimiser step on the source and one on the driving picture.",
                ),
                widgets.learning_rate(
                    _DEFAULT.learning_rate,
                    "The default is ours, for a LoRA. With whole_unet use the published 0.000002.",
                ),
                widgets.lora_rank(_DEFAULT.rank),
                widgets.seed("LoRA"),
                widgets.resume_from(),
                widgets.dtype(),
                widgets.min_snr_gamma(),
                *widgets.on_the_way("Iterations", "the source text"),
                widgets.whole_unet(False, "rank then has no effect.", optional=True, advanced=True),
                *widgets.masks("of source and driving picture, in this order, or one for both"),
                widgets.offload(),
                widgets.consent(kept=False),
            ],
            outputs=[
                widgets.LORA_MODEL.Output(
                    display_name="lora", tooltip="Connect it to Load LoRA Model, or to Save LoRA Weights."
                ),
                widgets.loss_map(),
            ],
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        pictures = [inputs.one_picture(lists.pop(name), name) for name in _PICTURES]
        texts = [inputs.one_text(lists.pop(f"{name}_text"), f"{name}_text") for name in _PICTURES]
        masks = loss_masks.pictures(lists.pop("masks", None), len(pictures))
        values = inputs.single_values(lists)
        consent = gate.check_training("Train Source and Driving Pair", values.get("consent"))
        warnings = _warnings(pictures, texts, masks, values["model"], values["vae"]) + [_NOT_SAVED] * bool(consent)
        tell("Train Source and Driving Pair", warnings, logging.WARNING)
        config, lora = _configs(values)
        latents = picture_training.encode_pictures(values["vae"], pictures)
        floor = values.get("mask_floor", 0.0)
        method = {**_settings(lora, texts, latents), **loss_masks.settings(masks, floor, inputs.digest)}
        settings = widgets.settings(values, config, method)
        lora_weights, loss_map = training.train(
            values["model"], values["clip"], values["vae"], latents, texts, config, lora,
            checkpoints=Checkpoints("source_driving_pair", settings), resume_from=values["resume_from"],
            weights=loss_masks.weights(masks, latents, floor),
        )
        return io.NodeOutput(lora_weights, loss_map)


def _warnings(pictures: list, texts: list[str], masks: list | None, model, vae) -> list[str]:
    empty = [
        f"{name}_text is empty, so no prompt will mean the {name} picture"
        for name, text in zip(_PICTURES, texts, strict=True) if not text
    ]
    described = [] if empty else texts
    findings = doctor.examine(
        pictures, described, images="source and driving", texts="source_text and driving_text", masks=masks,
        model=model, vae=vae,
    )
    return [*empty, *doctor.lines(findings)]


def _configs(values: dict) -> tuple[TrainingConfig, LoraConfig | None]:
    whole_unet = values.get("whole_unet", False)
    if whole_unet and values["learning_rate"] > HIGHEST_WHOLE_UNET_LEARNING_RATE:
        raise ValueError(
            f"learning_rate {values['learning_rate']:g} is for a LoRA and too much for a whole UNet: set it to the "
            f"published {_DEFAULT.whole_unet_learning_rate:.6f}, at most {HIGHEST_WHOLE_UNET_LEARNING_RATE:.4f}, or "
            "switch whole_unet off"
        )
    published = {"weight_decay": 0.0} if whole_unet else {}  # Adam
    config = widgets.config(values, steps_per_iteration=len(_PICTURES), **published)
    return config, None if whole_unet else LoraConfig(rank=values["rank"])


def _settings(lora: LoraConfig | None, texts: list[str], latents: list) -> dict:
    """The method's part of what a resumed run must share with the one that it continues."""
    return {
        "source picture": inputs.digest(latents[:1]), "driving picture": inputs.digest(latents[1:]),
        "source_text": texts[0], "driving_text": texts[1], "rank": lora.rank if lora else "whole UNet",
    }


NODES = [UnderstudyTrainSourceDrivingPair]
