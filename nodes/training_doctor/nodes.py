"""The node that looks at training data without training on it; every Train node checks its own by itself."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..inputs.checked import CheckedNode
from ..inputs.model_fit import check_encoded
from ..messages import tell
from ..patching import models
from ..training import doctor, inputs, picture_training, widgets
from ..training.config import TrainingConfig
from ..training.doctor import Finding
from ..training.objective import Denoising, Sample
from ..training.reference_loss import ReferenceLoss
from ..training.session import session

_FOR_LOSSES = ("model", "clip", "vae")
_HEALTHY = "nothing was found that a machine can see"


class UnderstudyTrainingDoctor(CheckedNode):
    """Findings on pictures, captions and masks, with cures; and with a model the loss on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainingDoctor", display_name="Training Doctor",
            category="Understudy/Checks",
            description="Looks for what makes a training bad, before you train: near-duplicates, one light or side, "
            "captions that say the same or name what should be learned, masks, sizes. Each finding has a cure.",
            search_aliases=[
                "dataset check", "data set quality", "duplicates", "captions", "validate training images", "LoRA",
                "データセット", "学習", "数据集", "训练", "检查",
            ],
            is_input_list=True, is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to train on, as a batch or a list. Sizes may differ."),
                io.String.Input(
                    "captions", multiline=True,
                    tooltip="What each picture shows: a line or list item per picture, or one for all. Empty is a "
                    "finding.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The base model: tells the size to train at and, with clip and vae, the loss on the "
                    "pictures.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the captions, for the loss."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the pictures, for the loss."),
                widgets.LORA_MODEL.Input(
                    "lora", optional=True,
                    tooltip="A trained LoRA, from a Train node: its loss on the pictures is compared with the base "
                    "model's, with the same noise.",
                ),
                io.Mask.Input(
                    "masks", optional=True, tooltip="Where the subject is, 1, in each picture: one mask per picture.",
                ),
                io.String.Input(
                    "learned_words", default="", optional=True,
                    tooltip="Words for what should be learned, separated by commas, such as an action: captions that "
                    "say them are found.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="findings", tooltip="One finding per line, with its cure."),
                io.Boolean.Output(display_name="healthy", tooltip="True where nothing serious was found."),
            ],
        )

    @classmethod
    def execute(cls, images, captions, masks=None, **lists) -> io.NodeOutput:
        values = inputs.single_values(lists)
        pictures = inputs.pictures(images, "images")
        texts = inputs.texts_for(captions, len(pictures), "captions")
        learned = values.get("learned_words", "")
        findings = [
            *doctor.of_named(texts, "captions", (learned,)),
            *doctor.examine(
                pictures, texts, learned=(learned,), masks=_masks(masks, pictures), model=values.get("model"),
                vae=values.get("vae"),
            ),
            *_losses(values, pictures, texts),
        ]
        lines = doctor.lines(sorted(findings, key=lambda finding: not finding.serious)) or [_HEALTHY]
        healthy = not any(finding.serious for finding in findings)
        tell("Training Doctor", lines, logging.INFO if healthy else logging.WARNING)
        text = "\n".join(lines)
        return io.NodeOutput(text, healthy, ui={"text": (text,)})


def _masks(masks: Sequence[torch.Tensor] | None, pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each mask [H, W]. Raises ValueError where there is not one for each picture."""
    if not masks:
        return []
    singles = [mask for batch in masks for mask in batch.reshape(-1, *batch.shape[-2:])]
    return inputs.one_each(singles, len(pictures), "masks", kind="masks", each="picture")


def _losses(values: dict[str, Any], pictures: Sequence[torch.Tensor], texts: Sequence[str]) -> list[Finding]:
    """The loss of the base model on the pictures, and of a LoRA of it."""
    missing = [name for name in _FOR_LOSSES if values.get(name) is None]
    if missing:
        if values.get("lora") is None:
            return []
        raise ValueError(f"lora needs a model to be compared with: connect {' and '.join(missing)} as well")
    latents = picture_training.encode_pictures(values["vae"], pictures)
    conditionings = picture_training.encode_texts(values["clip"], texts)
    check_encoded(conditionings, latents, values["model"])
    unnamed = [
        Finding("captions hold {subject}, which nothing fills in here: write the trigger there for a true loss")
    ] * any("{subject}" in text for text in texts)
    before = _loss(values["model"], latents, conditionings)
    if values.get("lora") is None:
        return [*unnamed, Finding(f"loss of the base model on these pictures {before:.4f}")]
    tuned = models.with_lora(values["model"], weights=values["lora"], strength=1.0)
    return [*unnamed, doctor.compared(before, _loss(tuned, latents, conditionings))]


def _loss(model: Any, latents: Sequence[torch.Tensor], conditionings: Sequence[list]) -> float:
    config = TrainingConfig(steps=1, learning_rate=1e-4)  # nothing is trained; a session loads the model
    largest = max(latents, key=torch.Tensor.numel)
    with session(model, [1, *largest.shape[1:]], config) as denoiser:
        samples = [
            Sample(denoiser.model.process_latent_in(latent.clone()).float(), denoiser.prepare(text, latent))
            for latent, text in zip(latents, conditionings, strict=True)
        ]
        return ReferenceLoss.of_samples(Denoising(denoiser, config), samples)()


NODES = [UnderstudyTrainingDoctor]
