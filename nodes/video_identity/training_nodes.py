"""Nodes that train and save a video identity adapter (Stand-In)."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy_api.latest import io

from ..consent import gate
from ..fingerprint import fingerprint
from ..inputs.checked import CheckedNode
from ..inputs.latents import check_frames, check_not_zero
from ..messages import tell
from ..training import doctor, drawing, inputs, loss_masks, previews, widgets
from ..training.checkpoints import Checkpoints
from ..training.stored import is_stored
from . import files, training
from .config import LOSS_WEIGHTINGS, AdapterTrainingConfig
from .nodes import ADAPTER, CATEGORY

_DEFAULT = AdapterTrainingConfig()


class UnderstudyTrainVideoIdentityAdapter(CheckedNode):
    """Trains an adapter on videos, each with a picture of the person in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainVideoIdentityAdapter", display_name="Train Video Identity Adapter (Stand-In)",
            category=CATEGORY,
            description="Trains an adapter that keeps the person of a reference picture through a video, on pairs of "
            "both. Only updates of the reference's queries, keys and values are trained.",
            search_aliases=[
                "Stand-In", "train adapter", "identity adapter", "fine-tune", "Wan", "face video", "顔",
                "人脸",
            ],
            is_input_list=True,
            inputs=[
                widgets.model("Wan"),
                io.Latent.Input("latents", tooltip="VAE-encoded videos, as a batch or a list. Sizes may differ."),
                io.Latent.Input(
                    "references",
                    tooltip="VAE-encoded pictures from Prepare Reference: one per video, or one for all.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="What each video shows: one text per video, or one for all.",
                ),
                widgets.steps(
                    _DEFAULT.steps, "Optimiser steps. Published: 3,000, of 48 videos each.", most=1_000_000
                ),
                widgets.learning_rate(
                    _DEFAULT.learning_rate,
                    "Muon's is of that size or more. The default is ours: the publication names none.",
                ),
                io.Int.Input(
                    "rank", default=_DEFAULT.rank, min=1, max=1024,
                    tooltip="Rank of the updates. Published: 128. A lower one makes a smaller file and learns less.",
                ),
                widgets.batch_size(
                    _DEFAULT.batch_size, "Videos per step, all of one size. More is steadier and takes more memory.",
                ),
                widgets.seed("adapter"),
                widgets.resume_from(),
                widgets.dtype(),
                *widgets.on_the_way("Steps"),
                *widgets.masks("a list item per video, of one mask or one per frame, or one for all"),
                widgets.offload(),
                widgets.consent(),
                io.Combo.Input(
                    "loss_weighting", options=list(LOSS_WEIGHTINGS), default=_DEFAULT.loss_weighting, optional=True,
                    advanced=True,
                    tooltip="Which noise levels count. bell is the official repository's: shift 5, and most weight "
                    "on middle levels, where looks are decided. even takes the model's own levels alike.",
                ),
                io.Float.Input(
                    "decay", default=0.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True,
                    tooltip="Share of the steps, at the end, over which the learning rate falls to 0; 0 keeps it.",
                ),
                widgets.optimizer(),
            ],
            outputs=[
                ADAPTER.Output(display_name="adapter", tooltip="Connect it to Apply or Save Video Identity Adapter."),
                widgets.loss_map(),
            ],
        )

    @classmethod
    def execute(cls, latents, references, positive, masks=None, **lists) -> io.NodeOutput:
        values = inputs.single_values(lists)
        videos = inputs.single_latents(latents, "latents")
        pictures = inputs.single_latents(references, "references")
        _check_references(pictures)
        of_video = values["model"].model.latent_format.latent_dimensions == 3  # others are refused by their name
        for name, connected in (("latents", latents), ("references", references)) if of_video else ():
            for latent in () if is_stored(connected) else connected:
                check_frames(latent["samples"], name)
        if len(pictures) == 1 < len(videos):
            tell("Train Video Identity Adapter", [f"one reference is trained with all {len(videos)} videos"])
        pictures = inputs.one_each(pictures, len(videos), "references", kind="items", each="video")
        if not all(positive):
            raise ValueError("positive holds an empty conditioning: connect CLIP Text Encode")
        texts = inputs.one_each(positive, len(videos), "positive", kind="items", each="video")
        consent = gate.check_training("Train Video Identity Adapter", values.get("consent"))
        config, weighting = widgets.config(values), values.get("loss_weighting", _DEFAULT.loss_weighting)
        masks, floor = loss_masks.videos(masks, len(videos)), values.get("mask_floor", 0.0)
        findings = _findings(values["model"], videos, pictures, texts, masks)
        tell("Train Video Identity Adapter", doctor.lines(findings), logging.WARNING)
        settings = {
            "videos": inputs.digest(videos), "references": inputs.digest(pictures),
            "texts": inputs.conditioning_digest(texts), "rank": values["rank"], "loss_weighting": weighting,
            **loss_masks.settings(masks, floor, inputs.digest),
            "decay": config.decay, "optimizer": config.optimizer,
            # A falling rate ends with the last step: a run to another one is another run.
            **({"steps": config.steps} if config.decay else {}),
        }
        checkpoints = Checkpoints("video_identity_adapter", widgets.settings(values, config, settings))
        adapter, loss_map = training.train(
            values["model"], videos, pictures, texts, config, values["rank"],
            checkpoints=checkpoints, resume_from=values["resume_from"],
            weights=loss_masks.weights(masks, videos, floor), loss_weighting=weighting,
        )
        adapter = dataclasses.replace(adapter, base=fingerprint(values["model"]), consent=consent)
        return io.NodeOutput(adapter, loss_map)


def _findings(
    model: Any, videos: Sequence[torch.Tensor], pictures: Sequence[torch.Tensor], texts: Sequence[list],
    masks: Sequence[torch.Tensor] | None,
) -> list[doctor.Finding]:
    """What these latents, CONDITIONINGs and masks [F, H, W] will teach badly."""
    if is_stored(videos):  # a job's, which is examined in the graph
        return []
    findings = [*doctor.of_copies([doctor.features(video) for video in videos], "latents")]
    if len({id(picture) for picture in pictures}) > 1:
        findings += doctor.of_copies([doctor.features(picture) for picture in pictures], "references")
        findings += _of_light(model, pictures, "references")
    scale = model.model.latent_format.spacial_downscale_ratio
    sizes = [(video.shape[-1] * scale, video.shape[-2] * scale) for video in videos]
    findings += [*_of_light(model, videos, "latents"), *doctor.of_sizes(sizes, "latents", None, "video")]
    findings += [*doctor.of_masks((mask.mean(0) for mask in masks or ()), kind="video"), *doctor.of_model(model)]
    if len(videos) > 1 and len({inputs.conditioning_digest([text]) for text in texts}) == 1:
        findings.append(doctor.Finding(
            f"positive: all {len(videos)} videos have the same text, so what differs between them is learned as "
            "well: describe each video"
        ))
    return findings


def _of_light(model: Any, latents: Sequence[torch.Tensor], name: str) -> Iterator[doctor.Finding]:
    """One light, in the rough colours of latents [1, C, T, H, W], where ComfyUI has some; a video's frames as one."""
    space = model.model.latent_format
    if space.latent_rgb_factors is None or any(latent.shape[1] != space.latent_channels for latent in latents):
        return  # training refuses those of another model
    colours = (drawing.in_colours(model.model, latent).clamp(0, 1) for latent in latents)
    yield from doctor.of_light([colour.flatten(1, 2) for colour in colours], name)


def _check_references(pictures: Sequence[torch.Tensor]) -> None:
    shapes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(shapes) > 1 or next(iter(shapes))[1] != 1:
        raise ValueError(
            f"references have the shapes {sorted(shapes)}: connect single pictures of one size, as a list, since VAE "
            "Encode treats a batch of pictures as one video"
        )
    for picture in pictures:
        check_not_zero(picture, "references")


class UnderstudySaveVideoIdentityAdapter(widgets.SaveNode):
    """The adapter's weights as a file that the loader lists."""

    FOLDER = files.FOLDER

    @classmethod
    def define_schema(cls) -> io.Schema:
        return widgets.save_schema(
            "UnderstudySaveVideoIdentityAdapter", "Save Video Identity Adapter (Stand-In)", CATEGORY,
            ADAPTER.Input("adapter", tooltip="A trained or loaded adapter."), prefix="video_identity",
            folder=cls.FOLDER,
            description="Writes the adapter under its published key names to output/loras, where it can be loaded.",
            search_aliases=["Stand-In", "save adapter", "export", "save LoRA", "保存"],
        )

    @classmethod
    def execute(
        cls, adapter, filename_prefix, consent=None, preview=None, tags="", author=""
    ) -> io.NodeOutput:
        adapter = gate.with_consent("Save Video Identity Adapter", adapter, consent)
        previews.save_with(
            "Save Video Identity Adapter", lambda: files.save(adapter, filename_prefix, tags, author), preview
        )
        return io.NodeOutput()


NODES = [UnderstudyTrainVideoIdentityAdapter, UnderstudySaveVideoIdentityAdapter]
