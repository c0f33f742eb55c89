"""Nodes that train and save a video identity adapter (Stand-In)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from comfy_api.latest import io

from ..training import checkpoints, inputs, widgets
from . import files, training
from .config import AdapterTrainingConfig
from .nodes import ADAPTER, CATEGORY

_DEFAULT = AdapterTrainingConfig()


class UnderstudyTrainVideoIdentityAdapter(io.ComfyNode):
    """Trains the adapter on videos, each with a picture of who is in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainVideoIdentityAdapter",
            display_name="Train Video Identity Adapter (Stand-In)",
            category=CATEGORY,
            description="Learns to keep the person of a reference picture through a video, from pairs of both. Only "
            "the updates of the reference's own queries, keys and values are trained.",
            search_aliases=["Stand-In", "train adapter", "identity adapter", "fine-tune", "Wan", "face video"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The Wan model to learn beside. It is not changed."),
                io.Latent.Input("latents", tooltip="VAE-encoded videos, as a batch or a list. Sizes may differ."),
                io.Latent.Input(
                    "references",
                    tooltip="VAE-encoded pictures from Prepare Reference: one for each video, or one for all.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="What each video shows: one text for each video, or one for all.",
                ),
                io.Int.Input(
                    "steps", default=_DEFAULT.steps, min=1, max=1_000_000,
                    tooltip="Optimiser steps. Published: 3,000, of 48 videos each.",
                ),
                widgets.learning_rate(
                    _DEFAULT.learning_rate, "Of AdamW. The default is ours: the publication names none."
                ),
                io.Int.Input(
                    "rank", default=_DEFAULT.rank, min=1, max=1024,
                    tooltip="Rank of the updates. Published: 128. Less is a smaller file and learns less.",
                ),
                io.Int.Input(
                    "batch_size", default=_DEFAULT.batch_size, min=1, max=1024,
                    tooltip="Videos in a step, all of one size. More is steadier, and takes more memory.",
                ),
                widgets.seed("adapter"),
                widgets.resume_from(),
                widgets.dtype(),
                widgets.gradient_checkpointing(),
                widgets.checkpoint_every("Steps"),
            ],
            outputs=[
                ADAPTER.Output(display_name="adapter", tooltip="Connect it to Apply or Save Video Identity Adapter."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Connect it to Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, latents, references, positive, **lists) -> io.NodeOutput:
        given = {name: values[0] for name, values in lists.items()}
        videos = _singles(latents, "latents")
        pictures = _one_each(_singles(references, "references"), len(videos), "references")
        _check_references(pictures)
        if len(pictures) > len({id(picture) for picture in pictures}):
            logging.info("[Understudy] one reference is learnt with all %d videos", len(videos))
        if not all(positive):
            raise ValueError("positive holds an empty conditioning: connect CLIP Text Encode")
        texts = _one_each(list(positive), len(videos), "positive")
        config = widgets.config(given, batch_size=given["batch_size"])
        settings = {
            "videos": inputs.digest(videos), "references": inputs.digest(pictures),
            "texts": inputs.conditioning_digest(texts), "rank": given["rank"],
        }
        kept = checkpoints.Checkpoints("video_identity_adapter", widgets.settings(given, config, settings))
        adapter, loss_map = training.train(
            given["model"], videos, pictures, texts, config, given["rank"],
            checkpoints=kept, resume_from=given["resume_from"],
        )
        return io.NodeOutput(adapter, loss_map)


def _singles(latents: Sequence[dict], name: str) -> list[torch.Tensor]:
    """Each latent of a list of LATENTs as [1, C, T, H, W]. Raises ValueError, naming the input."""
    singles = []
    for latent in latents:
        samples = latent["samples"]
        if samples.is_nested or samples.ndim not in (4, 5):
            raise ValueError(f"{name} hold something else than image and video latents: connect VAE Encode")
        samples = samples.unsqueeze(2) if samples.ndim == 4 else samples
        if not torch.isfinite(samples).all():
            raise ValueError(f"{name} hold NaN or infinite values: encode them again, with the VAE in fp32")
        singles += [samples[i : i + 1].clone() for i in range(len(samples))]
    if not singles:
        raise ValueError(f"{name} hold no latent: connect at least one")
    return singles


def _one_each(items: list, count: int, name: str) -> list:
    if len(items) == 1:
        return items * count
    if len(items) != count:
        raise ValueError(f"{name} has {len(items)} items for {count} videos: give one a video, or one for all")
    return items


def _check_references(pictures: Sequence[torch.Tensor]) -> None:
    shapes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(shapes) > 1 or next(iter(shapes))[1] != 1:
        raise ValueError(
            f"references have the shapes {sorted(shapes)}: give single pictures of one size, as a list, since VAE "
            "Encode takes a batch of pictures for a video"
        )
    if any(not picture.any() for picture in pictures):
        raise ValueError("references hold a latent of zeros, which shows nobody: connect VAE Encode of a picture")


class UnderstudySaveVideoIdentityAdapter(io.ComfyNode):
    """The adapter's weights as a file that the loader lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudySaveVideoIdentityAdapter",
            display_name="Save Video Identity Adapter (Stand-In)",
            category=CATEGORY,
            description="Writes the adapter under its published key names to output/loras, where it can be loaded.",
            search_aliases=["Stand-In", "save adapter", "export", "save LoRA"],
            is_output_node=True,
            inputs=[
                ADAPTER.Input("adapter", tooltip="A trained or loaded adapter."),
                io.String.Input(
                    "filename_prefix", default="video_identity",
                    tooltip="Name in output/loras, with folders if you like. A number is added; nothing is replaced.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, adapter, filename_prefix) -> io.NodeOutput:
        path = files.save(adapter, filename_prefix)
        logging.info("[Understudy] saved %s", path)
        return io.NodeOutput()


NODES = [UnderstudyTrainVideoIdentityAdapter, UnderstudySaveVideoIdentityAdapter]
