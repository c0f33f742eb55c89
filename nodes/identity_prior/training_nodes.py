"""Nodes that train and save an identity prior (LIPE): a LoRA that knows a subject by a token and its class."""

import dataclasses
import logging

from comfy_api.latest import io

from .. import subject_tokens
from ..consent import gate
from ..fingerprint import fingerprint
from ..inputs.checked import CheckedNode
from ..inputs.widgets import IDENTITY
from ..messages import tell
from ..subject_tokens import Subject
from ..training import doctor, inputs, loss_masks, picture_training, previews, widgets
from ..training.checkpoints import Checkpoints
from . import files, training
from .config import AUGMENTS, IdentityPriorConfig
from .nodes import CATEGORY

_DEFAULT = IdentityPriorConfig()


class UnderstudyTrainIdentityPrior(CheckedNode):
    """Trains a LoRA on the attention of a model, on a few captioned pictures of one subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainIdentityPrior", display_name="Train Identity Prior (LIPE)",
            category=CATEGORY,
            description="Trains a LoRA on 3 to 5 pictures of one subject with detailed captions of action and view, "
            "beside pictures of its class, so that prompts can give it another pose, expression or view.",
            search_aliases=[
                "LIPE", "DreamBooth", "train LoRA", "fine-tune", "personalization", "subject", "人物",
                "身份",
            ],
            is_input_list=True,
            inputs=[
                widgets.model(),
                io.Clip.Input("clip", tooltip="Encodes the captions. It is not trained."),
                widgets.vae("the pictures"),
                io.Image.Input(
                    "images", tooltip="Pictures of the subject, 3 to 5, as a batch or a list. Sizes may differ.",
                ),
                io.String.Input(
                    "captions", multiline=True, default="a photo of {subject}",
                    tooltip="What each picture shows, one line or list item per picture, or one for all: action, "
                    "view, place, with {subject} for the token and class. Actions need detailed captions.",
                ),
                io.String.Input(
                    "identity_token", default="sks", tooltip="One rare word that will stand for this subject.",
                ),
                io.String.Input(
                    "class_noun", default="person", tooltip="What the subject is, in the model's words: dog, robot.",
                ),
                widgets.steps(
                    _DEFAULT.steps, "Optimiser steps. More learns the subject better, and follows prompts less.",
                ),
                widgets.learning_rate(_DEFAULT.learning_rate, "The default is ours, for a LoRA."),
                widgets.lora_rank(_DEFAULT.rank),
                widgets.batch_size(
                    1, "Pictures of the subject per step; as many of the class join them in the same pass.", most=256,
                ),
                widgets.seed("prior"),
                io.Image.Input(
                    "class_images", optional=True,
                    tooltip="Pictures of other members of the class, which preserve what the class noun means. If "
                    "not connected, the model draws them itself.",
                ),
                io.String.Input(
                    "class_captions", optional=True, force_input=True,
                    tooltip="What each class picture shows, one per picture or one for all. If not connected, what "
                    "class_actions say, or just the noun where class_images are connected.",
                ),
                io.Float.Input(
                    "prior_weight", default=_DEFAULT.prior_weight, min=0.0, max=10.0, step=0.05, round=False,
                    tooltip="Weight of the class pictures' loss: 0 is off, 1 counts it as much as the subject's.",
                ),
                io.Combo.Input(
                    "augment", options=list(AUGMENTS), default=_DEFAULT.augment,
                    tooltip="none trains on the pictures as they are. crop adds slight crops. crop_and_flip also "
                    "adds mirror images, with left and right swapped in their captions: not for text, or for a "
                    "subject whose sides differ.",
                ),
                widgets.resume_from(),
                io.Int.Input(
                    "class_count", default=_DEFAULT.class_count, min=1, max=1000, optional=True, advanced=True,
                    tooltip="How many class pictures the model draws if none are connected; at least one for each "
                    "class caption.",
                ),
                widgets.dtype(),
                widgets.min_snr_gamma(),
                *widgets.on_the_way("Steps", "the first caption"),
                *widgets.masks("one mask per picture, or one for all"),
                widgets.offload(),
                widgets.consent(),
                io.String.Input(
                    "class_actions", default=_DEFAULT.class_actions, optional=True, advanced=True,
                    tooltip="What members of the class do in the pictures that the model draws, in turn, separated "
                    "by commas: others than in the captions, as well. Empty takes your captions. No effect with "
                    "class_captions or class_images.",
                ),
            ],
            outputs=[
                widgets.LORA_MODEL.Output(
                    display_name="lora", tooltip="Connect it to Save Identity Prior, or to Load LoRA Model."
                ),
                IDENTITY.Output(
                    display_name="identity", tooltip="Connect it to Encode Identity and Save Identity Prior."
                ),
                widgets.loss_map(),
            ],
        )

    @classmethod
    def execute(cls, images, captions, class_images=None, class_captions=None, masks=None, **lists) -> io.NodeOutput:
        values = inputs.single_values(lists)
        prior = IdentityPriorConfig(
            rank=values["rank"], prior_weight=values["prior_weight"], augment=values["augment"],
            **{name: values.get(name, getattr(_DEFAULT, name)) for name in ("class_count", "class_actions")},
        )
        pictures = inputs.pictures(images, "images")
        captions = inputs.texts_for(captions, len(pictures), "captions")
        subject, texts = _subject(values, captions)
        config = widgets.config(values)
        warnings = _warnings(values["clip"], subject, len(pictures))
        masks = loss_masks.pictures(masks, len(pictures))
        findings = doctor.examine(
            pictures, captions, learned=(subject.token, subject.noun), masks=masks, model=values["model"],
            vae=values["vae"],
        )
        tell("Train Identity Prior", [*warnings, *doctor.lines(findings)], logging.WARNING)
        if masks is not None:  # cut and mirrored as the pictures are
            masks, _ = training.variants(masks, texts, prior.augment, config.seed)
        pictures, texts = training.variants(pictures, texts, prior.augment, config.seed)
        latents = picture_training.encode_pictures(values["vae"], pictures)
        floor = values.get("mask_floor", 0.0)
        classes = training.class_pictures(values["vae"], subject, texts, prior, class_images, class_captions)
        settings = {
            "pictures": inputs.digest(latents), "captions": texts, "rank": prior.rank,
            "class_pictures": inputs.digest(classes.latents) if class_images else "made by the model",
            "class_captions": list(classes.texts), "prior_weight": prior.prior_weight,
            **loss_masks.settings(masks, floor, inputs.digest),
        }
        lora, loss_map = training.train(
            values["model"], values["clip"], values["vae"], latents, texts, classes, prior, config,
            checkpoints=Checkpoints("identity_prior", widgets.settings(values, config, settings)),
            resume_from=values["resume_from"], weights=loss_masks.weights(masks, latents, floor),
        )
        return io.NodeOutput(lora, subject, loss_map)


def _subject(values: dict, captions: list[str]) -> tuple[Subject, list[str]]:
    """The subject with what its file will say, and the captions with its words in them."""
    subject = Subject(values["identity_token"].strip(), values["class_noun"].strip())
    texts = [subject.expand(text, f"caption {i + 1} of captions") for i, text in enumerate(captions)]
    captions_once = tuple(dict.fromkeys(texts))
    consent = gate.check_training("Train Identity Prior", values.get("consent"))
    base = fingerprint(values["model"])
    return dataclasses.replace(subject, captions=captions_once, base=base, consent=consent), texts


def _warnings(clip, subject: Subject, count: int) -> list[str]:
    """What makes for a worse prior, though it can be trained."""
    warnings = subject_tokens.warnings(clip, subject)
    if count == 1:
        warnings.append("1 picture: the prior learns its pose and place as well; connect 3 to 5")
    return warnings


class UnderstudySaveIdentityPrior(widgets.SaveNode):
    """A prior as a LoRA file that says which subject it knows."""

    FOLDER = files.FOLDER

    @classmethod
    def define_schema(cls) -> io.Schema:
        return widgets.save_schema(
            "UnderstudySaveIdentityPrior", "Save Identity Prior (LIPE)", CATEGORY,
            widgets.LORA_MODEL.Input("lora", tooltip="The trained LoRA."),
            IDENTITY.Input("identity", tooltip="The subject that it knows, from Train Identity Prior."),
            prefix="identity_prior", folder=cls.FOLDER,
            description="Writes the LoRA to output/loras, with token, class noun, captions and the base model's "
            "fingerprint in its metadata. Load LoRA and other programs can also read it.",
            search_aliases=["LIPE", "save LoRA", "export", "identity", "subject", "保存"],
        )

    @classmethod
    def execute(
        cls, lora, identity, filename_prefix, consent=None, preview=None, tags="", author=""
    ) -> io.NodeOutput:
        identity = gate.with_consent("Save Identity Prior", identity, consent)
        previews.save_with(
            "Save Identity Prior", lambda: files.save(lora, identity, filename_prefix, tags, author), preview
        )
        return io.NodeOutput()


NODES = [UnderstudyTrainIdentityPrior, UnderstudySaveIdentityPrior]
