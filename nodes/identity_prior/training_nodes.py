"""Nodes that train and save an identity prior (LIPE): a LoRA that knows a subject by a token and its class."""

from __future__ import annotations

import dataclasses
import logging

from comfy_api.latest import io

from .. import subject_tokens
from ..fingerprint import fingerprint
from ..messages import tell
from ..subject_tokens import Subject
from ..training import checkpoints, inputs, picture_training, widgets
from ..training.config import LoraConfig
from ..training.objective import Batches
from . import files, method, references
from .config import AUGMENTS, IdentityPriorConfig
from .nodes import CATEGORY, IDENTITY

_DEFAULT = IdentityPriorConfig()


class UnderstudyTrainIdentityPrior(io.ComfyNode):
    """Trains a LoRA on the attention of a model, on a few captioned pictures of one subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainIdentityPrior",
            display_name="Train Identity Prior (LIPE)",
            category=CATEGORY,
            description="Learns one subject from 3 to 5 pictures with detailed captions of action and view, beside "
            "pictures of its class, so that prompts can give it another pose, expression or view.",
            search_aliases=["LIPE", "DreamBooth", "train LoRA", "fine-tune", "personalization", "subject"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to learn beside. It is not changed."),
                io.Clip.Input("clip", tooltip="Encodes the captions. It is not trained."),
                io.Vae.Input("vae", tooltip="Encodes the pictures, and decodes previews where memory allows."),
                io.Image.Input(
                    "images", tooltip="Pictures of the subject, 3 to 5, as a batch or a list. Sizes may differ.",
                ),
                io.String.Input(
                    "captions", multiline=True, default="a photo of {subject}",
                    tooltip="What each picture shows, one line or list item a picture, or one for all: action, view, "
                    "place, with {subject} for the token and class. Actions need detailed ones.",
                ),
                io.String.Input(
                    "identity_token", default="sks", tooltip="One rare word that comes to mean this subject.",
                ),
                io.String.Input(
                    "class_noun", default="person", tooltip="What the subject is, in the model's words: dog, robot.",
                ),
                io.Int.Input(
                    "steps", default=_DEFAULT.steps, min=1, max=100_000,
                    tooltip="Optimiser steps. More knows the subject better, and follows prompts less.",
                ),
                widgets.learning_rate(_DEFAULT.learning_rate, "Of AdamW. The default is ours, for a LoRA."),
                io.Int.Input(
                    "rank", default=_DEFAULT.rank, min=1, max=256,
                    tooltip="Rank of the LoRA: more learns more, and takes more memory.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=256,
                    tooltip="Pictures of the subject in a step; as many of the class come with them, in one pass.",
                ),
                widgets.seed("prior"),
                io.Image.Input(
                    "class_images", optional=True,
                    tooltip="Pictures of other members of the class, which keep the class noun's meaning. Nothing "
                    "connected: the model makes them itself.",
                ),
                io.String.Input(
                    "class_captions", optional=True, force_input=True,
                    tooltip="What each class picture shows, one each or one for all. Nothing connected: the captions "
                    "with the class noun alone, or the noun where class_images are given.",
                ),
                io.Float.Input(
                    "prior_weight", default=_DEFAULT.prior_weight, min=0.0, max=10.0, step=0.05, round=False,
                    tooltip="Weight of the class pictures' loss: 0 is off, 1 as much as the subject's.",
                ),
                io.Combo.Input(
                    "augment", options=list(AUGMENTS), default=_DEFAULT.augment,
                    tooltip="none learns the pictures as they are. crop adds slight crops. crop_and_flip adds mirror "
                    "images, too, with left and right swapped in their captions: not for text, or for a subject "
                    "whose sides differ.",
                ),
                widgets.resume_from(),
                io.Int.Input(
                    "class_count", default=_DEFAULT.class_count, min=1, max=1000, optional=True, advanced=True,
                    tooltip="How many class pictures the model makes where none are connected; at least one for each "
                    "class caption.",
                ),
                widgets.dtype(),
                widgets.min_snr_gamma(),
                widgets.gradient_checkpointing(),
                io.Int.Input(
                    "preview_every", default=0, min=0, max=100_000, optional=True, advanced=True,
                    tooltip="Steps between preview pictures of the first caption, with a fixed noise; 0 is never.",
                ),
                widgets.checkpoint_every("Steps"),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="Connect it to Save Identity Prior, or to Load LoRA Model."
                ),
                IDENTITY.Output(
                    display_name="identity", tooltip="Connect it to Encode Identity and Save Identity Prior."
                ),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Connect it to Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, images, captions, class_images=None, class_captions=None, **lists) -> io.NodeOutput:
        given = {name: values[0] for name, values in lists.items()}
        prior = IdentityPriorConfig(
            prior_weight=given["prior_weight"], augment=given["augment"],
            class_count=given.get("class_count", _DEFAULT.class_count),
        )
        subject = Subject(given["identity_token"].strip(), given["class_noun"].strip())
        pictures = inputs.pictures(images, "images")
        texts = _expanded(subject, inputs.lines(captions, len(pictures), "captions"))
        subject = dataclasses.replace(
            subject, captions=tuple(dict.fromkeys(texts)), base=fingerprint(given["model"])
        )
        config = widgets.config(
            given, batch_size=given["batch_size"], min_snr_gamma=given.get("min_snr_gamma", 0.0),
            preview_every=given.get("preview_every", 0),
        )
        tell("Train Identity Prior", _warnings(given["clip"], subject, len(pictures)), logging.WARNING)
        pictures, texts = references.variants(pictures, texts, prior.augment, config.seed)
        latents = picture_training.encode_pictures(given["vae"], pictures)
        class_latents, class_texts = [], []
        if prior.prior_weight > 0:
            class_latents, class_texts = _classes(
                given, subject, texts, prior.class_count, class_images, class_captions
            )
        conditionings = picture_training.encode_texts(given["clip"], [*texts, *class_texts, ""])
        settings = {
            "pictures": inputs.digest(latents), "captions": texts, "rank": given["rank"],
            "class_pictures": inputs.digest(class_latents) if class_images else "made by the model",
            "class_captions": class_texts, "prior_weight": prior.prior_weight,
        }
        kept = checkpoints.Checkpoints("identity_prior", widgets.settings(given, config, settings))
        kept.resume(given["resume_from"])  # one that does not fit is refused before the model draws
        if class_texts and not class_latents:
            class_latents = references.generate(
                given["model"], conditionings[len(texts) : -1], conditionings[-1], latents[0].shape, config.seed
            )

        def objective(denoising, samples):
            if not class_latents:
                return denoising
            subjects, others = (
                Batches(part, config.batch_size) for part in (samples[: len(latents)], samples[len(latents) :])
            )
            return method.PriorObjective(denoising.loss, subjects, others, prior.prior_weight)

        lora, loss_map = picture_training.train_on_pictures(
            given["model"],
            [*latents, *class_latents],
            conditionings[:-1],
            config,
            LoraConfig(rank=given["rank"]),
            checkpoints=kept,
            resume_from=given["resume_from"],
            make_objective=objective,
            forward_batch=config.batch_size * (2 if class_latents else 1),
            preview=picture_training.preview_of(
                given["vae"], conditionings[0], conditionings[-1], latents[0].shape, config.seed
            ),
        )
        return io.NodeOutput(lora, subject, loss_map)


def _expanded(subject: Subject, texts: list[str]) -> list[str]:
    return [subject.expand(text, f"caption {i + 1} of captions") for i, text in enumerate(texts)]


def _warnings(clip, subject: Subject, count: int) -> list[str]:
    """What speaks against this run and does not stop it."""
    lines = subject_tokens.warnings(clip, subject)
    if count == 1:
        lines.append("1 picture: the prior learns its pose and place as well; connect 3 to 5")
    return lines


def _classes(given, subject, texts, count, class_images, class_captions) -> tuple[list, list[str]]:
    """Texts of the class, and latents where its pictures are given: else the model is to make one for each text."""
    if class_images:
        pictures = inputs.pictures(class_images, "class_images")
        class_texts = inputs.lines(class_captions or f"a {subject.noun}", len(pictures), "class_captions")
        latents = picture_training.encode_pictures(given["vae"], pictures)
        return latents, [subject.as_class_prompt(text) for text in class_texts]
    told = [line for text in class_captions or () for line in text.splitlines() if line.strip()]
    known = list(dict.fromkeys(subject.as_class_prompt(text) for text in told or texts))
    if told:  # none of them is left out
        count = max(count, len(known))
    return [], [known[i % len(known)] for i in range(count)]


class UnderstudySaveIdentityPrior(io.ComfyNode):
    """A prior as a LoRA file that remembers whom it knows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudySaveIdentityPrior",
            display_name="Save Identity Prior (LIPE)",
            category=CATEGORY,
            description="Writes the LoRA to output/loras, with token, class noun, captions and the base model's "
            "fingerprint in its metadata. Load LoRA and other programs read it, too.",
            search_aliases=["LIPE", "save LoRA", "export", "identity", "subject"],
            is_output_node=True,
            inputs=[
                io.Custom("LORA_MODEL").Input("lora", tooltip="The trained LoRA."),
                IDENTITY.Input("identity", tooltip="Whom it knows, from Train Identity Prior."),
                io.String.Input(
                    "filename_prefix", default="identity_prior",
                    tooltip="Name in output/loras, with folders if you like. A number is added; nothing is replaced.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, lora, identity, filename_prefix) -> io.NodeOutput:
        path = files.save(lora, identity, filename_prefix)
        logging.info("[Understudy] saved %s", path)
        return io.NodeOutput()


NODES = [UnderstudyTrainIdentityPrior, UnderstudySaveIdentityPrior]
