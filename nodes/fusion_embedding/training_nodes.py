"""Nodes that train a fusion (FPDM), stage 1, the combiner, and stage 2, the generator, and save it."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..fingerprint import weights_fingerprint
from ..training import checkpoints, widgets
from . import encoding, files, pairs, training
from .config import CombinerConfig, GeneratorConfig
from .method import Fusion
from .nodes import CATEGORY, FUSION

_COMBINER = CombinerConfig()
_GENERATOR = GeneratorConfig()


def _pictures() -> list[io.Image.Input]:
    """What a pair is made of."""
    return [
        io.Image.Input(
            "source", optional=True,
            tooltip="Who it is: one picture for each pair, as a batch or a list, or one for all.",
        ),
        io.Image.Input(
            "pose", optional=True, tooltip="OpenPose drawings of the people in target, in the same order.",
        ),
        io.Image.Input("target", optional=True, tooltip="The same people in these poses, in the same order."),
    ]


def _dataset_folder() -> io.Combo.Input:
    return io.Combo.Input(
        "dataset_folder", options=pairs.choices(), default=pairs.NONE, optional=True,
        tooltip="In place of the three inputs: a folder in ComfyUI's input folder that holds source, pose and target "
        "folders, with one file name for a pair. It is read as it goes and may be larger than memory.",
    )


def _share(id: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        id, default=getattr(_GENERATOR, id), min=0.0, max=0.99, step=0.01, round=False, optional=True, advanced=True,
        tooltip=tooltip,
    )


def _outputs(to: str) -> list:
    return [
        FUSION.Output(display_name="fusion", tooltip=to),
        io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="Connect it to Plot Loss Graph."),
    ]


class _LearntFromPairs(io.ComfyNode):
    """What both stages share."""

    @classmethod
    def fingerprint_inputs(cls, dataset_folder=(pairs.NONE,), **_lists) -> str:
        """A folder whose pictures changed is learnt anew."""
        return pairs.folder_digest(dataset_folder[0] or pairs.NONE)  # None where it is a link


class UnderstudyTrainFusionCombiner(_LearntFromPairs):
    """Stage 1: trains a combiner, and with it the image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainFusionCombiner",
            display_name="Train Fusion Combiner (FPDM)",
            category=CATEGORY,
            description="Learns to make one embedding of a source picture and a pose that finds the picture of that "
            "person in that pose. How often it does is shown while it trains.",
            search_aliases=["FPDM", "train combiner", "fusion embedding", "contrastive", "stage 1", "fine-tune"],
            is_input_list=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder for source, pose and target. It is not changed.",
                ),
                *_pictures(),
                io.Int.Input(
                    "steps", default=_COMBINER.steps, min=1, max=1_000_000,
                    tooltip="Optimiser steps. Published: 5 times through the data, 48 pairs a step.",
                ),
                widgets.learning_rate(_COMBINER.learning_rate, "Of AdamW. Published: 0.00001."),
                io.Float.Input(
                    "temperature", default=_COMBINER.temperature, min=0.01, max=1.0, step=0.01, round=False,
                    tooltip="Divides similarities: lower looks harder at the most alike. Published: 0.07.",
                ),
                io.Int.Input(
                    "batch_size", default=_COMBINER.batch_size, min=2, max=4096,
                    tooltip="Pairs in a step, among which each target is to be found. Published: 48.",
                ),
                io.Boolean.Input(
                    "train_encoder", default=_COMBINER.train_encoder,
                    tooltip="Trains a copy of the encoder, as published: 16 bytes of memory a weight more, and the "
                    "file holds it. Off, only the combiner learns.",
                ),
                widgets.seed("combiner"),
                _dataset_folder(),
                widgets.resume_from(),
                widgets.gradient_checkpointing(),
                widgets.checkpoint_every("Steps"),
            ],
            outputs=_outputs("Connect it to Train Fusion Generator, or to Save Fusion."),
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        given, data = _given(lists)
        combiner = CombinerConfig(
            temperature=given["temperature"], batch_size=given["batch_size"], train_encoder=given["train_encoder"]
        )
        config = widgets.config(given, batch_size=combiner.batch_size, weight_decay=combiner.weight_decay)
        settings = {
            "pairs": data.digest(), "temperature": combiner.temperature, "train_encoder": combiner.train_encoder,
            "clip_vision": weights_fingerprint(given["clip_vision"].get_sd()),
        }
        kept = checkpoints.Checkpoints("fusion_combiner", widgets.settings(given, config, settings))
        fusion, loss_map = training.train_combiner(
            given["clip_vision"], data, config, combiner, checkpoints=kept, resume_from=given["resume_from"],
        )
        return io.NodeOutput(fusion, loss_map)


class UnderstudyTrainFusionGenerator(_LearntFromPairs):
    """Stage 2: trains the paths into a UNet, with a LoRA of it or the whole of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainFusionGenerator",
            display_name="Train Fusion Generator (FPDM)",
            category=CATEGORY,
            description="Learns to draw the person of the source in the pose: appearance, fusion embedding and pose "
            "lead a UNet. Without a fusion it learns with the other two, a good first step.",
            search_aliases=["FPDM", "train pose transfer", "person image synthesis", "stage 2", "fine-tune", "LoRA"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The SD 1.5, 2.1 or SDXL model to learn beside. It is not changed."),
                io.Vae.Input("vae", tooltip="Encodes the targets, and decodes previews where memory allows."),
                FUSION.Input(
                    "fusion", optional=True,
                    tooltip="From Train Fusion Combiner. Leave it free for stage 2 alone, without an embedding.",
                ),
                io.ClipVision.Input(
                    "appearance_encoder",
                    tooltip="Encodes the source's appearance, frozen; DINOv2 Large as published, or another.",
                ),
                *_pictures(),
                io.Int.Input(
                    "steps", default=_GENERATOR.steps, min=1, max=10_000_000,
                    tooltip="Optimiser steps. The default is ours.",
                ),
                widgets.learning_rate(
                    _GENERATOR.learning_rate, "Of AdamW. Published: 0.0001, for the whole UNet; ours for a LoRA, too."
                ),
                io.Int.Input(
                    "batch_size", default=_GENERATOR.batch_size, min=1, max=1024,
                    tooltip="Pairs in a step, all of one size. More is steadier, and takes more memory.",
                ),
                io.Boolean.Input(
                    "whole_unet", default=_GENERATOR.whole_unet,
                    tooltip="Learns all weights of the UNet, as published: 16 bytes of memory a weight more, 14 GB "
                    "for SD 2.1, and a file of 3.5 GB. Off, it learns a LoRA, for smaller cards.",
                ),
                widgets.seed("generator"),
                _dataset_folder(),
                widgets.resume_from(),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="The encoder of the combiner. Only for a fusion that holds none.",
                ),
                io.Int.Input(
                    "rank", default=_GENERATOR.rank, min=1, max=256, optional=True, advanced=True,
                    tooltip="Rank of the LoRA: more learns more, and takes more memory. Not for whole_unet.",
                ),
                _share("source_drop", "Share of pictures that learn without appearance. Published: 0.2."),
                _share("fusion_drop", "Share of pictures that learn without fusion embedding. Published: 0.2."),
                _share("pose_drop", "Share of pictures that learn without pose. Published: 0.2."),
                io.Float.Input(
                    "noise_offset", default=_GENERATOR.noise_offset, min=0.0, max=1.0, step=0.01, round=False,
                    optional=True, advanced=True,
                    tooltip="Noise that is equal over the picture, beside the usual: for dark darks. Published: 0.1.",
                ),
                widgets.dtype(),
                widgets.gradient_checkpointing(),
                io.Int.Input(
                    "preview_every", default=0, min=0, max=100_000, optional=True, advanced=True,
                    tooltip="Steps between preview pictures of the first pair, with a fixed noise; 0 is never.",
                ),
                widgets.checkpoint_every("Steps"),
            ],
            outputs=_outputs("Connect it to Apply Fusion, or to Save Fusion."),
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        given, data = _given(lists)
        chosen = {
            name: given[name] for name in ("rank", "source_drop", "fusion_drop", "pose_drop", "noise_offset")
            if name in given
        }
        generator = GeneratorConfig(batch_size=given["batch_size"], whole_unet=given["whole_unet"], **chosen)
        config = widgets.config(
            given, batch_size=generator.batch_size, preview_every=given.get("preview_every", 0)
        )
        fusion = given.get("fusion") or Fusion()
        settings = {
            "pairs": data.digest(), "rank": "whole UNet" if generator.whole_unet else generator.rank,
            "source_drop": generator.source_drop, "fusion_drop": generator.fusion_drop,
            "pose_drop": generator.pose_drop, "noise_offset": generator.noise_offset,
            "vae": weights_fingerprint(given["vae"].get_sd()),
            "appearance_encoder": weights_fingerprint(given["appearance_encoder"].get_sd()),
            "combiner": weights_fingerprint(fusion.combiner or {}),
        }
        if fusion.combiner is not None:
            encoder = encoding.chosen(fusion, given.get("clip_vision"))
            settings["clip_vision"] = weights_fingerprint(encoder.get_sd())
        kept = checkpoints.Checkpoints("fusion_generator", widgets.settings(given, config, settings))
        trained, loss_map = training.train_generator(
            given["model"], given["vae"], given["appearance_encoder"], data, fusion, given.get("clip_vision"), config,
            generator, checkpoints=kept, resume_from=given["resume_from"],
        )
        return io.NodeOutput(trained, loss_map)


def _given(lists: dict) -> tuple[dict, pairs.Pairs]:
    """The settings of a node whose every input is a list, and the pairs."""
    pictures = {name: lists.pop(name, None) for name in pairs.ROLES}
    given = {name: values[0] for name, values in lists.items() if values}
    return given, pairs.chosen(pictures, given.get("dataset_folder", pairs.NONE))


class UnderstudySaveFusion(io.ComfyNode):
    """A trained fusion as a file that the loader lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudySaveFusion",
            display_name="Save Fusion (FPDM)",
            category=CATEGORY,
            description="Writes a fusion to output/fusion_embeddings: the parts that it has, with a LoRA or a whole "
            "UNet, and says which.",
            search_aliases=["FPDM", "save fusion embedding", "pose transfer", "export"],
            is_output_node=True,
            inputs=[
                FUSION.Input("fusion", tooltip="A trained or loaded fusion."),
                io.String.Input(
                    "filename_prefix", default="fusion",
                    tooltip="Name in output/fusion_embeddings, with folders if you like. A number is added; nothing "
                    "is replaced.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, fusion, filename_prefix) -> io.NodeOutput:
        path = files.save(fusion, filename_prefix)
        logging.info("[Understudy] saved %s, %s", path, ", ".join(fusion.parts))
        return io.NodeOutput()


NODES = [UnderstudyTrainFusionCombiner, UnderstudyTrainFusionGenerator, UnderstudySaveFusion]
