"""Node of frequency guidance's fine-tuning (ImPoster): a LoRA or a UNet that knows the source and driving picture."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..messages import tell
from ..training import checkpoints, inputs, picture_training, widgets
from ..training.config import LoraConfig, TrainingConfig
from . import method
from .config import HIGHEST_WHOLE_UNET_LEARNING_RATE, SourceDrivingPairConfig
from .nodes import CATEGORY

_DEFAULT = SourceDrivingPairConfig()
_TURNS = 2  # optimiser steps an iteration: source, driving


class UnderstudyTrainSourceDrivingPair(io.ComfyNode):
    """Trains a LoRA, or the whole UNet, on one source and one driving picture, each with its text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainSourceDrivingPair",
            display_name="Train Source and Driving Pair (ImPoster)",
            category=CATEGORY,
            description="Learns one source and one driving picture, so that their texts mean just these two. "
            "Then let frequency guidance and the prompt switch put the action on the source.",
            search_aliases=["ImPoster", "train LoRA", "fine-tune", "action transfer", "DreamBooth"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to learn beside. It is not changed."),
                io.Clip.Input("clip", tooltip="Encodes the two texts. It is not trained."),
                io.Vae.Input("vae", tooltip="Encodes the two pictures, and decodes previews where memory allows."),
                io.Image.Input("source", tooltip="One picture of who it is, at the size to generate."),
                io.String.Input(
                    "source_text", multiline=True, tooltip="What the source picture shows: subject, action, place."
                ),
                io.Image.Input("driving", tooltip="One picture of the action, at the size to generate."),
                io.String.Input(
                    "driving_text", multiline=True, tooltip="What the driving picture shows: subject, action, place."
                ),
                io.Int.Input(
                    "steps", default=_DEFAULT.steps, min=1, max=100_000,
                    tooltip="Iterations; each is one optimiser step on the source and one on the driving picture.",
                ),
                widgets.learning_rate(
                    _DEFAULT.learning_rate,
                    "Of AdamW. The default is ours, for a LoRA. With whole_unet use the published 0.000002.",
                ),
                io.Int.Input(
                    "rank", default=_DEFAULT.rank, min=1, max=256,
                    tooltip="Rank of the LoRA: more learns more, and takes more memory.",
                ),
                widgets.seed("LoRA"),
                widgets.resume_from(),
                widgets.dtype(),
                widgets.min_snr_gamma(),
                widgets.gradient_checkpointing(),
                io.Int.Input(
                    "preview_every", default=0, min=0, max=100_000, optional=True, advanced=True,
                    tooltip="Iterations between preview pictures of the source text, with a fixed noise; 0 is never.",
                ),
                widgets.checkpoint_every("Iterations"),
                io.Boolean.Input(
                    "whole_unet", default=False, optional=True, advanced=True,
                    tooltip="Learns all weights, as published, in place of a LoRA: 16 bytes of memory a weight more, "
                    "14 GB for SD 2.1, and 3.5 GB to save. rank has no effect then.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="Connect it to Load LoRA Model, or to Save LoRA Weights."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Connect it to Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        source, driving = (inputs.one_picture(lists.pop(name), name) for name in ("source", "driving"))
        texts = [inputs.one_text(lists.pop(f"{name}_text"), f"{name}_text") for name in ("source", "driving")]
        empty = [name for name, text in zip(("source", "driving"), texts, strict=True) if not text]
        said = [f"{name}_text is empty, so no prompt will mean the {name} picture" for name in empty]
        tell("Train Source and Driving Pair", said, logging.WARNING)
        given = {name: values[0] for name, values in lists.items()}
        config, lora = _configs(given)
        latents = picture_training.encode_pictures(given["vae"], [source, driving])
        conditionings = picture_training.encode_texts(given["clip"], [*texts, ""])
        lora_weights, loss_map = picture_training.train_on_pictures(
            given["model"],
            latents,
            conditionings[:2],
            config,
            lora,
            checkpoints=checkpoints.Checkpoints(
                "source_driving_pair", widgets.settings(given, config, _settings(lora, texts, latents))
            ),
            resume_from=given["resume_from"],
            make_objective=lambda denoising, samples: method.PairObjective(denoising.loss, samples, config.seed),
            preview=picture_training.preview_of(
                given["vae"], conditionings[0], conditionings[2], latents[0].shape, config.seed
            ),
        )
        return io.NodeOutput(lora_weights, loss_map)


def _configs(given: dict) -> tuple[TrainingConfig, LoraConfig | None]:
    whole_unet = given.get("whole_unet", False)
    if whole_unet and given["learning_rate"] > HIGHEST_WHOLE_UNET_LEARNING_RATE:
        raise ValueError(
            f"learning_rate {given['learning_rate']:g} is for a LoRA and too much for a whole UNet: set it to the "
            f"published {_DEFAULT.whole_unet_learning_rate:.6f}, at most {HIGHEST_WHOLE_UNET_LEARNING_RATE:.4f}, or "
            "switch whole_unet off"
        )
    config = widgets.config(
        given,
        _TURNS,
        min_snr_gamma=given.get("min_snr_gamma", 0.0),
        preview_every=given.get("preview_every", 0) * _TURNS,
        **({"weight_decay": 0.0} if whole_unet else {}),  # published: Adam
    )
    return config, None if whole_unet else LoraConfig(rank=given["rank"])


def _settings(lora: LoraConfig | None, texts: list[str], latents: list) -> dict:
    """The node's own of what a resumed run must share with the one it goes on from."""
    return {
        "source picture": inputs.digest(latents[:1]), "driving picture": inputs.digest(latents[1:]),
        "source_text": texts[0], "driving_text": texts[1], "rank": lora.rank if lora else "whole UNet",
    }


NODES = [UnderstudyTrainSourceDrivingPair]
