"""The node that writes a training as a folder, for `workflows/train.py` on another machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..action_identifier.training_nodes import UnderstudyTrainActionIdentifier
from ..frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair
from ..fusion_embedding import pairs
from ..fusion_embedding.training_nodes import UnderstudyTrainFusionCombiner, UnderstudyTrainFusionGenerator
from ..identity_prior.training_nodes import UnderstudyTrainIdentityPrior
from ..inputs.checked import CheckedNode, allowed
from ..inputs.families import family
from ..messages import tell
from ..subject_tokens import Subject
from ..training import inputs
from ..training.objective import prediction_kind
from ..video_identity.training_nodes import UnderstudyTrainVideoIdentityAdapter
from . import conditionings, other_trainers
from .folder import INPUT, SAMPLES, JobFolder
from .loaders import loader

TRAININGS = (
    UnderstudyTrainIdentityPrior, UnderstudyTrainActionIdentifier, UnderstudyTrainSourceDrivingPair,
    UnderstudyTrainFusionCombiner, UnderstudyTrainFusionGenerator, UnderstudyTrainVideoIdentityAdapter,
)
# Texts that say what pictures show: they lie beside them, a file each.
_TEXTS = {"captions": "images", "class_captions": "class_images", "subjects": "images"}
_PAIRS = "pairs"
CONSENT = "consent"  # a record, which goes as text
# What a job's own folder decides.
_LEFT_OUT = ("resume_from",)


def _options() -> list[io.DynamicCombo.Option]:
    """Each training with its node's own inputs."""
    options = []
    for node in TRAININGS:
        schema = node.define_schema()
        shown = [widget for widget in schema.inputs if widget.id not in _LEFT_OUT]
        for widget in shown:
            if hasattr(widget, "control_after_generate"):
                widget.control_after_generate = None
        options.append(io.DynamicCombo.Option(schema.display_name, shown))
    return options


class UnderstudyExportTrainingJob(CheckedNode):
    """Writes what a Train node would train on, and how, into a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnderstudyExportTrainingJob", display_name="Export Training Job", category="Understudy",
            description="Writes a training with its data and settings as a folder, which workflows/train.py trains "
            "on another machine, on one GPU or many. It has the inputs of the Train node that you choose.",
            search_aliases=[
                "train on a cluster", "multi-GPU", "distributed training", "accelerate", "musubi-tuner", "ai-toolkit",
                "data set", "学習", "训练",
            ],
            is_input_list=True, is_output_node=True, hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.DynamicCombo.Input(
                    "job", options=_options(),
                    tooltip="Which training; its inputs are those of that Train node. Models must come straight from "
                    "nodes that load them, since the job loads them again by these.",
                ),
                io.String.Input(
                    "folder", default="job",
                    tooltip="Name in output/training_jobs, and of the file that is trained. A number is added; "
                    "nothing is replaced.",
                ),
                io.Combo.Input(
                    "also_for", options=list(other_trainers.TRAINERS), default=other_trainers.NONE, optional=True,
                    advanced=True,
                    tooltip="Of an identity prior: also a configuration of another program, for the same pictures. "
                    "none writes no other, musubi-tuner its data set's and training's, ai-toolkit its job.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, job, folder, also_for=(other_trainers.NONE,)) -> io.NodeOutput:
        node, values = _chosen(job)
        prompt, node_id = cls.hidden.prompt, cls.hidden.unique_id
        refused = {training.__name__ for training in TRAININGS}
        (folder,), (also_for,) = folder, also_for

        def load(name: str) -> dict[str, Any]:
            return loader(prompt, node_id, f"job.{name}", refused)

        if also_for != other_trainers.NONE and node is not UnderstudyTrainIdentityPrior:
            raise ValueError(f"also_for is {also_for}, which trains identity priors only: choose one in job, or none")
        models = {
            widget.id: load(widget.id) for widget in node.define_schema().inputs
            if widget.id in values and _kind(widget) == "model"
        }
        target = JobFolder(folder)
        with target.whole():
            data, settings = _written(node, values, target)
            config = {
                "node": node.define_schema().node_id, "name": Path(target.name).name, "settings": settings,
                "data": data, "models": models,
            }
            path = target.write_config(config, "Train it with: python workflows/train.py job.toml")
            others = _written_for(also_for, target, values, data, settings)
        tell("Export Training Job", [f"{path} is written: python workflows/train.py {path} trains it", *others])
        return io.NodeOutput()


def _chosen(job: dict[str, Any]) -> tuple[type[CheckedNode], dict[str, list]]:
    """The training's node, and the lists of values that its own schema allows."""
    (name,) = job["job"]
    by_name = {node.define_schema().display_name: node for node in TRAININGS}
    if name not in by_name:
        raise ValueError(f"job is {name!r}: use one of {', '.join(by_name)}")
    values = {key: value for key, value in job.items() if key != "job" and value is not None}
    return by_name[name], allowed(by_name[name].define_schema(), values)


def _kind(widget: io.Input) -> str:
    """Where an input's values go: a data folder, the settings, or, of a model, the nodes that load it."""
    if isinstance(widget, io.Image.Input | io.Mask.Input | io.Latent.Input | io.Conditioning.Input):
        return "data"
    return "setting" if isinstance(widget, io.WidgetInput) or widget.id == CONSENT else "model"


def _written(node: type[CheckedNode], values: dict[str, list], target: JobFolder) -> tuple[dict, dict]:
    """Write all data; returns the folder of each input, and the settings."""
    data: dict[str, str] = {}
    settings: dict[str, Any] = {}
    if "dataset_folder" in {widget.id for widget in node.define_schema().inputs}:
        settings["dataset_folder"] = _pairs(values, target)
    for widget in node.define_schema().inputs:
        if widget.id not in values or _kind(widget) == "model" or widget.id == "dataset_folder":
            continue
        if _kind(widget) == "data":
            data[widget.id] = _WRITERS[type(widget)](target, widget.id, values[widget.id])
        elif widget.id in _TEXTS and _TEXTS[widget.id] in values:
            folder = _TEXTS[widget.id]
            count = len(inputs.pictures(values[folder], folder))
            texts = inputs.texts_for(values[widget.id], count, widget.id)
            data[widget.id] = target.write_texts(folder, _with_subject(widget.id, texts, values))
        else:
            only = values[widget.id]
            if widget.id == CONSENT:
                only = [record.to_json() for record in only]
            settings[widget.id] = only[0] if len(only) == 1 else list(only)
    return data, settings


def _pairs(values: dict[str, list], target: JobFolder) -> str:
    """A fusion's pairs as a folder of the job's, from the chosen folder or from the pictures, which are taken out."""
    chosen = (values.get("dataset_folder") or [pairs.NONE])[0]
    pictures = {role: values.pop(role, None) for role in pairs.ROLES}
    pairs.open_pairs(pictures, chosen)  # checks them
    if chosen != pairs.NONE:
        root = Path(folder_paths.get_input_directory()) / chosen
        masks = [pairs.MASK] if (root / pairs.MASK).is_dir() else []
        return target.copy_folders(root, _PAIRS, [*pairs.ROLES, *masks])
    count = len(inputs.pictures(pictures["target"], "target"))
    for role in pairs.ROLES:
        singles = inputs.pictures(pictures[role], role)
        target.write_pictures(f"{_PAIRS}/{role}", [singles[i % len(singles)] for i in range(count)])
    return _PAIRS


def _with_subject(name: str, texts: list[str], values: dict[str, list]) -> list[str]:
    """A prior's texts with the subject's words in them, as every program reads them."""
    if "identity_token" not in values:
        return texts
    subject = Subject(values["identity_token"][0].strip(), values["class_noun"][0].strip())
    if name == "captions":
        return [subject.expand(text, f"caption {i + 1} of captions") for i, text in enumerate(texts)]
    return [subject.as_class_prompt(text) for text in texts]


def _masks(masks: list) -> list:
    return [mask[None] for batch in masks for mask in (batch if batch.ndim == 3 else batch[None])]


def _latents(name: str, latents: list) -> list:
    return [({SAMPLES: video}, {}) for video in inputs.single_latents(latents, name)]


_WRITERS: dict[type, Callable[[JobFolder, str, list], str]] = {
    io.Image.Input: lambda target, name, batches: target.write_pictures(name, inputs.pictures(batches, name)),
    io.Mask.Input: lambda target, name, masks: target.write_pictures(name, _masks(masks)),
    io.Latent.Input: lambda target, name, latents: target.write_tensors(name, _latents(name, latents)),
    io.Conditioning.Input: lambda target, name, texts: target.write_tensors(
        name, [conditionings.packed(text, name) for text in texts]
    ),
}


def _written_for(program: str, target: JobFolder, values: dict, data: dict, settings: dict) -> list[str]:
    """Write another program's configuration; returns what to tell of it, with what it leaves out."""
    if program == other_trainers.NONE:
        return []

    def place(name: str) -> str | None:
        return f"{INPUT}/{data[name]}" if name in data else None

    pictures = inputs.pictures(values["images"], "images")
    lines = []
    if "class_images" not in data and settings["prior_weight"]:
        lines.append(f"{program} gets no class pictures, which this training draws itself: connect class_images")
    masks = place("masks") if len(_masks(values.get("masks", []))) == len(pictures) else None
    if "masks" in data and (program == other_trainers.MUSUBI or masks is None):
        fix = "it has none" if program == other_trainers.MUSUBI else "connect one for each picture"
        lines.append(f"{program} gets no masks and learns from whole pictures: {fix}")
    if program == other_trainers.MUSUBI:
        return [*_written_for_musubi(target, values["model"][0], place, pictures, settings), *lines]
    sampling = values["model"][0].get_model_object("model_sampling")
    kind = prediction_kind(sampling, "training")
    text = other_trainers.ai_toolkit(
        target.name, place("images"), place("class_images"), pictures, settings, family(values["model"][0]), kind,
        masks,
    )
    path = target.path / "ai_toolkit.json"
    path.write_text(text, encoding="utf-8")
    return [f"{path} is for {program}: fill in what it has in capitals, and start run.py in the job's folder", *lines]


def _written_for_musubi(
    target: JobFolder, model: Any, place: Callable[[str], str | None], pictures: list, settings: dict
) -> list[str]:
    """Write musubi-tuner's data set, and its training where it trains this family; returns what to tell of them."""
    path = target.path / other_trainers.MUSUBI_DATA
    text = other_trainers.musubi(place("images"), place("class_images"), pictures, settings["batch_size"])
    path.write_text(text, encoding="utf-8")
    training = other_trainers.musubi_training(family(model), Path(target.name).name, settings)
    if training is None:
        return [
            f"{path} is a data set alone, since this node knows no training of {family(model)} in "
            f"{other_trainers.MUSUBI}: choose {other_trainers.AI_TOOLKIT}, or train the job with workflows/train.py"
        ]
    text, script = training
    (target.path / other_trainers.MUSUBI_TRAINING).write_text(text, encoding="utf-8")
    return [
        f"{path} and {other_trainers.MUSUBI_TRAINING} are for {other_trainers.MUSUBI}: fill in what the second "
        f"has in capitals, and start in the job's folder {script}_cache_latents.py and "
        f"{script}_cache_text_encoder_outputs.py with --dataset_config, then {script}_train_network.py with "
        f"--config_file {other_trainers.MUSUBI_TRAINING}"
    ]


NODES = [UnderstudyExportTrainingJob]
