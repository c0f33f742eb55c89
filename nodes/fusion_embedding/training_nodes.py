"""Nodes that train both stages of a fusion (FPDM), the combiner and the generator, and save it."""

import dataclasses
import logging
from collections.abc import Sequence

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io

from ..consent import gate
from ..fingerprint import weights_fingerprint
from ..inputs.checked import CheckedNode, File
from ..messages import tell
from ..training import doctor, inputs, loss_masks, previews, widgets
from ..training.checkpoints import Checkpoints
from . import encoding, files, pairs, training
from .config import (
    BUDGETS,
    CUSTOM,
    MOST_EMBEDDING_TOKENS,
    Budgets,
    CombinerConfig,
    GeneratorConfig,
    within_budget,
)
from .layout import FusionError
from .method import Fusion, pose_warnings
from .nodes import CATEGORY, FUSION

_COMBINER = CombinerConfig()
_GENERATOR = GeneratorConfig()
# Of all pairs, spread evenly, since reading from a folder takes time: whose poses and light are looked at, and whose
# targets are compared with each other.
_LOOKED_AT, _COMPARED = 8, 500


def _pictures() -> list[io.Image.Input]:
    """The three inputs of a pair."""
    return [
        io.Image.Input(
            "source", optional=True,
            tooltip="The person: one picture per pair, as a batch or a list, or one for all.",
        ),
        io.Image.Input(
            "pose", optional=True, tooltip="OpenPose drawings of the people in target, in the same order.",
        ),
        io.Image.Input("target", optional=True, tooltip="The same people in these poses, in the same order."),
    ]


def _dataset_folder() -> File:
    return File(
        "dataset_folder", options=pairs.choices(), default=pairs.NONE, optional=True,
        tooltip="Instead of the three inputs: a folder in ComfyUI's input folder that holds the folders source, pose "
        "and target, with the same file name for the pictures of a pair. It may be larger than memory.",
    )


def _share(id: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        id, default=getattr(_GENERATOR, id), min=0.0, max=0.99, step=0.01, round=False, optional=True, advanced=True,
        tooltip=tooltip,
    )


def _budget(consumer: str, published: str) -> io.Combo.Input:
    return io.Combo.Input(
        "budget", options=list(BUDGETS), default=CUSTOM, optional=True, advanced=True,
        tooltip=f"custom takes the settings above. consumer is {consumer}. published is {published}. Both replace "
        "those settings, and the node says what they are.",
    )


def _outputs(to: str) -> list:
    return [FUSION.Output(display_name="fusion", tooltip=to), widgets.loss_map()]


class _TrainedOnPairs(CheckedNode):
    """What both stages share."""

    @classmethod
    def fingerprint_inputs(cls, dataset_folder=(pairs.NONE,), **_lists) -> str:
        """Trains again if the pictures of the folder changed."""
        return pairs.folder_digest(dataset_folder[0] or pairs.NONE)  # None where it is a link


class UnderstudyTrainFusionCombiner(_TrainedOnPairs):
    """Stage 1: trains a combiner, and with it the image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainFusionCombiner", display_name="Train Fusion Combiner (FPDM)",
            category=CATEGORY,
            description="Trains a combiner: one embedding of a source picture and a pose, which finds the picture of "
            "that person in that pose. How often it succeeds is shown during training.",
            search_aliases=[
                "FPDM", "train combiner", "fusion embedding", "contrastive", "stage 1", "fine-tune",
                "ポーズ", "姿态",
            ],
            is_input_list=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder for source, pose and target; it is not modified.",
                ),
                *_pictures(),
                widgets.steps(
                    _COMBINER.steps, "Optimiser steps. Published: 5 times through the data, 48 pairs per step.",
                    most=1_000_000,
                ),
                widgets.learning_rate(_COMBINER.learning_rate, "Published: 0.00001."),
                io.Float.Input(
                    "temperature", default=_COMBINER.temperature, min=0.01, max=1.0, step=0.01, round=False,
                    tooltip="Divides similarities: lower values look harder at the most similar ones. Published: "
                    "0.07.",
                ),
                widgets.batch_size(
                    _COMBINER.batch_size, "Pairs per step, among which each target is retrieved. Published: 48.",
                    least=2, most=4096,
                ),
                io.Boolean.Input(
                    "train_encoder", default=_COMBINER.train_encoder,
                    tooltip="Trains a copy of the encoder, as published: 16 more bytes of memory per weight, and the "
                    "file holds it. When off, only the combiner is trained.",
                ),
                widgets.seed("combiner"),
                _dataset_folder(),
                widgets.resume_from(),
                *widgets.on_the_way("Steps"),
                *widgets.masks("of the targets, one per pair or for all; a dataset_folder may hold a folder mask"),
                widgets.consent(),
                widgets.offload("the encoder's trained copies", "train_encoder on a small card"),
                _budget(
                    "2,000 steps of 48 pairs with a frozen encoder",
                    "5 times through the data in steps of 48 pairs, with the encoder",
                ),
            ],
            outputs=_outputs("Connect it to Train Fusion Generator, or to Save Fusion."),
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        values, data, masks = _values_and_pairs(lists, "Train Fusion Combiner", CombinerConfig.budgets)
        if masks is not None:
            data = pairs.MaskedPairs(data, masks, values.get("mask_floor", 0.0))
        consent = gate.check_training("Train Fusion Combiner", values.get("consent"))
        combiner = CombinerConfig(
            temperature=values["temperature"], batch_size=values["batch_size"], train_encoder=values["train_encoder"]
        )
        config = widgets.config(values, weight_decay=combiner.weight_decay)
        settings = {
            "pairs": data.digest(), "temperature": combiner.temperature, "train_encoder": combiner.train_encoder,
            "clip_vision": weights_fingerprint(values["clip_vision"].get_sd()),
        }
        checkpoints = Checkpoints("fusion_combiner", widgets.settings(values, config, settings))
        fusion, loss_map = training.train_combiner(
            values["clip_vision"], data, config, combiner, checkpoints=checkpoints, resume_from=values["resume_from"],
        )
        return io.NodeOutput(dataclasses.replace(fusion, consent=consent), loss_map)


class UnderstudyTrainFusionGenerator(_TrainedOnPairs):
    """Stage 2: trains the paths into a UNet, with a LoRA of it or the whole of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyTrainFusionGenerator", display_name="Train Fusion Generator (FPDM)",
            category=CATEGORY,
            description="Trains a UNet to draw the person of the source in the pose, guided by appearance, fusion "
            "embedding and pose. Without a fusion it trains with the other two, a good first step.",
            search_aliases=[
                "FPDM", "train pose transfer", "person image synthesis", "stage 2", "fine-tune", "LoRA",
                "ポーズ", "姿态",
            ],
            is_input_list=True,
            inputs=[
                widgets.model("SD 1.5, SD 2.1 or SDXL"),
                widgets.vae("the targets"),
                FUSION.Input(
                    "fusion", optional=True,
                    tooltip="From Train Fusion Combiner, or with train_further from Load Fusion. If not connected, "
                    "stage 2 is trained alone, without an embedding.",
                ),
                io.ClipVision.Input(
                    "appearance_encoder",
                    tooltip="Encodes the source's appearance, and stays frozen: DINOv2 Large, as published, or "
                    "another.",
                ),
                *_pictures(),
                widgets.steps(_GENERATOR.steps, "Optimiser steps. The default is ours.", most=10_000_000),
                widgets.learning_rate(
                    _GENERATOR.learning_rate, "Published for the whole UNet: 0.0001; for a LoRA the default is ours."
                ),
                widgets.batch_size(
                    _GENERATOR.batch_size, "Pairs per step, all of one size. More is steadier and takes more memory.",
                ),
                widgets.whole_unet(_GENERATOR.whole_unet, "When off, a LoRA is trained, which fits smaller cards."),
                widgets.seed("generator"),
                _dataset_folder(),
                widgets.resume_from(),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="The encoder of the combiner. Only needed for a fusion that holds none.",
                ),
                widgets.lora_rank(_GENERATOR.rank, "No effect with whole_unet.", optional=True, advanced=True),
                _share("source_drop", "Share of pictures trained without appearance. Published: 0.2."),
                _share("fusion_drop", "Share of pictures trained without fusion embedding. Published: 0.2."),
                _share("pose_drop", "Share of pictures trained without pose. Published: 0.2."),
                io.Float.Input(
                    "noise_offset", default=_GENERATOR.noise_offset, min=0.0, max=1.0, step=0.01, round=False,
                    optional=True, advanced=True,
                    tooltip="Extra noise that is constant over the picture, for deeper darks. Published: 0.1.",
                ),
                widgets.dtype(),
                *widgets.on_the_way("Steps", "the first pair"),
                *widgets.masks("of the targets, one per pair or for all; a dataset_folder may hold a folder mask"),
                widgets.offload(),
                widgets.consent(),
                io.Int.Input(
                    "embedding_tokens", default=_GENERATOR.embedding_tokens, min=0, max=MOST_EMBEDDING_TOKENS,
                    optional=True, advanced=True,
                    tooltip="Tokens by which the UNet also reads the fusion embedding, beside the class embedding. "
                    "0 is as published, where what the source wears may not arrive; 4 is a good start.",
                ),
                io.Float.Input(
                    "embedding_rate", default=_GENERATOR.embedding_rate, min=0.0, max=100.0, step=0.1, round=False,
                    optional=True, advanced=True,
                    tooltip="Factor on the learning rate of what reads the fusion embedding: class embedding and "
                    "embedding_tokens. Above 1 where the node says that their gradient is small.",
                ),
                io.Boolean.Input(
                    "clip_by_path", default=_GENERATOR.clip_by_path, optional=True, advanced=True,
                    tooltip="Clips the gradient of each path (appearance, embedding, pose, UNet) apart, so that a "
                    "large one does not shrink the steps of the others.",
                ),
                _share(
                    "early_source_drop", "Share of pictures trained without appearance in the first early_steps, "
                    "in which the fusion embedding alone shows the source.",
                ),
                io.Int.Input(
                    "early_steps", default=_GENERATOR.early_steps, min=0, max=10_000_000, optional=True,
                    advanced=True,
                    tooltip="Optimiser steps at the beginning in which early_source_drop holds, if it is higher than "
                    "source_drop. 0 is off, as published.",
                ),
                _budget(
                    "10,000 steps of 1 pair with a LoRA of rank 16",
                    "100 times through the data in steps of 126 pairs, the whole UNet",
                ),
                io.Boolean.Input(
                    "train_further", default=_GENERATOR.train_further, optional=True, advanced=True,
                    tooltip="Begins with the generator and the UNet that fusion holds, say a loaded one on your own "
                    "pairs, instead of new paths. Needs whole_unet.",
                ),
            ],
            outputs=_outputs("Connect it to Apply Fusion, or to Save Fusion."),
        )

    @classmethod
    def execute(cls, **lists) -> io.NodeOutput:
        values, data, masks = _values_and_pairs(lists, "Train Fusion Generator", GeneratorConfig.budgets)
        floor = values.get("mask_floor", 0.0)
        generator = GeneratorConfig(**{
            field.name: values[field.name] for field in dataclasses.fields(GeneratorConfig) if field.name in values
        })
        config = widgets.config(values)
        fusion = values.get("fusion") or Fusion()
        if generator.embedding_tokens and fusion.combiner is None:
            raise FusionError(
                f"embedding_tokens is {generator.embedding_tokens}, and without a fusion there is no embedding: "
                "connect Train Fusion Combiner to fusion, or set it to 0"
            )
        if generator.train_further and fusion.generator is None:
            raise FusionError(
                "train_further is on and there is no generator to train further: connect a trained fusion, from Load "
                "Fusion say, or switch it off"
            )
        consent = gate.check_training("Train Fusion Generator", values.get("consent"), fusion.consent)
        method = _generator_settings(values, data, generator, fusion)
        method |= loss_masks.settings(masks, floor, inputs.digest)
        settings = widgets.settings(values, config, method)
        trained, loss_map = training.train_generator(
            values["model"], values["vae"], values["appearance_encoder"], data, fusion, values.get("clip_vision"),
            config, generator, checkpoints=Checkpoints("fusion_generator", settings),
            resume_from=values["resume_from"], masks=masks, mask_floor=floor,
        )
        return io.NodeOutput(dataclasses.replace(trained, consent=consent), loss_map)


def _generator_settings(values: dict, data: pairs.Pairs, generator: GeneratorConfig, fusion: Fusion) -> dict:
    """The method's part of what a resumed run must share with the one that it continues."""
    settings = {
        "pairs": data.digest(), "rank": "whole UNet" if generator.whole_unet else generator.rank,
        "source_drop": generator.source_drop, "fusion_drop": generator.fusion_drop,
        "pose_drop": generator.pose_drop, "noise_offset": generator.noise_offset,
        "embedding_tokens": generator.embedding_tokens,
        "vae": weights_fingerprint(values["vae"].get_sd()),
        "appearance_encoder": weights_fingerprint(values["appearance_encoder"].get_sd()),
        "combiner": weights_fingerprint(fusion.combiner or {}),
    }
    # Where they are off, a checkpoint from before them can be resumed.
    names = ("embedding_rate", "clip_by_path", "early_source_drop", "early_steps")
    settings |= {n: value for n in names if (value := getattr(generator, n)) != getattr(_GENERATOR, n)}
    if generator.train_further:
        parts = fusion.generator, fusion.unet or {}
        settings["fusion to train further"] = " ".join(map(weights_fingerprint, parts))
    if fusion.combiner is not None:
        encoder = encoding.encoder_for(fusion, values.get("clip_vision"))
        settings["clip_vision"] = weights_fingerprint(encoder.get_sd())
    return settings


def _masks(masks: list | None, data: pairs.Pairs):
    """A mask for each target: the connected ones, or those of the folder; None if there is neither."""
    if masks is None and isinstance(data, pairs.FolderPairs):
        return data.masks()
    return loss_masks.pictures(masks, len(data))


def _values_and_pairs(lists: dict, node: str, budgets: Budgets) -> tuple[dict, pairs.Pairs, Sequence | None]:
    """The settings of a node whose every input is a list, the pairs and their masks; the node says what it finds."""
    pictures, masks = {name: lists.pop(name, None) for name in pairs.ROLES}, lists.pop("masks", None)
    values = inputs.single_values(lists)
    data = pairs.open_pairs(pictures, values.get("dataset_folder", pairs.NONE))
    if chosen := within_budget(budget := values.get("budget", CUSTOM), budgets, len(data)):
        values |= chosen
        tell(node, [f"budget {budget}: {', '.join(f'{name} {value}' for name, value in chosen.items())}"])
    masks = _masks(masks, data)
    if len(data) > _COMPARED:
        tell(node, [f"{_COMPARED} of {len(data)} targets, spread evenly, are compared for near-duplicates"])
    tell(node, _findings(values, data, masks), logging.WARNING)
    return values, data, masks


def _findings(values: dict, data: pairs.Pairs, masks: Sequence | None) -> list[str]:
    """What these pairs will teach badly, and poses that may be none."""
    checked, compared = _spread(len(data), _LOOKED_AT), _spread(len(data), _COMPARED)
    some = {i: data[i] for i in checked}
    poses = [line for i, pair in some.items() for line in pose_warnings(pair.pose, f"pose {i + 1}")]
    targets = [pair.target for pair in some.values()]
    small = []
    for i in compared:
        throw_exception_if_processing_interrupted()
        small.append(doctor.features(data.target(i)))
    model = values.get("model")
    findings = [
        *doctor.of_strangers(targets, "target", model, values.get("vae"), checked),
        *doctor.of_copies(small, "target", compared), *doctor.of_light(targets, "target"),
        *doctor.of_sizes([data.size(i)[::-1] for i in compared], "target", doctor.native_size(model)),
        *doctor.of_masks(() if masks is None else (masks[i][0, ..., 0] for i in compared), compared),
        *doctor.of_model(model),
    ]
    return [*poses, *doctor.lines(findings)]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly."""
    return sorted({i * count // most for i in range(most)})


class UnderstudySaveFusion(widgets.SaveNode):
    """A trained fusion as a file that the loader lists."""

    FOLDER = files.FOLDER

    @classmethod
    def define_schema(cls) -> io.Schema:
        return widgets.save_schema(
            "UnderstudySaveFusion", "Save Fusion (FPDM)", CATEGORY,
            FUSION.Input("fusion", tooltip="A trained or loaded fusion."), prefix="fusion", folder=cls.FOLDER,
            description="Writes a fusion to output/fusion_embeddings, with all its parts. The log names them.",
            search_aliases=["FPDM", "save fusion embedding", "pose transfer", "export", "保存"],
        )

    @classmethod
    def execute(
        cls, fusion, filename_prefix, consent=None, preview=None, tags="", author=""
    ) -> io.NodeOutput:
        fusion = gate.with_consent("Save Fusion", fusion, consent)
        previews.save_with(
            "Save Fusion", lambda: files.save(fusion, filename_prefix, tags, author), preview
        )
        logging.info("[Understudy] it holds %s", ", ".join(fusion.parts))
        return io.NodeOutput()


NODES = [UnderstudyTrainFusionCombiner, UnderstudyTrainFusionGenerator, UnderstudySaveFusion]
