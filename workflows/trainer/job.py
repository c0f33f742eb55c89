"""Reads a job that Export Training Job wrote, or that somebody typed, and runs its node in this process.

ComfyUI and the pack are importable, as `launcher.scripts` makes them.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PARTS = ("node", "settings", "models")


class JobError(Exception):
    """The job cannot be run as it is written; the message says why."""


def read(path: Path) -> dict[str, Any]:
    """The job in a TOML file. Raises JobError for other text, or where a part is missing."""
    try:
        job = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path} is not a job: {error}") from error
    missing = [part for part in _PARTS if part not in job]
    if missing:
        raise JobError(f"{path} has no {', '.join(missing)}: write it with Export Training Job")
    return {"name": path.parent.name, "data": {}, **job}


def train(job: Mapping[str, Any], folder: Path, resume_from: str) -> tuple[Callable[[], None], str]:
    """Run the job's training, on the data in `folder`/input. Returns what saves the result, and the node's name.

    Raises JobError, and what the node raises.
    """
    from pack.nodes.consent import record
    from pack.nodes.extension import METHOD_NODES
    from pack.nodes.training_jobs.nodes import CONSENT, TRAININGS

    by_id = {node.define_schema().node_id: node for node in TRAININGS}
    if job["node"] not in by_id:
        raise JobError(f"node is {job['node']!r}: use one of {', '.join(by_id)}")
    schema = by_id[job["node"]].define_schema()
    widgets = {widget.id: widget for widget in schema.inputs}
    for part in ("settings", "data", "models"):
        if unknown := sorted(job[part].keys() - widgets.keys()):
            raise JobError(f"{part} of the job has {', '.join(unknown)}, which {schema.display_name} does not have")
    values: dict[str, Any] = {}
    for name, widget in widgets.items():
        if getattr(widget, "default", None) is not None and name not in job["data"]:
            values[name] = [widget.default]
    loaded: dict[str, tuple] = {}
    own = {node.define_schema().node_id: node for node in METHOD_NODES}
    with torch.inference_mode():
        for name, loader in job["models"].items():
            values[name] = [_loaded(loader, loaded, own)]
        for name, value in job["settings"].items():
            if name == CONSENT:
                value = record.from_json(value)
            values[name] = value if isinstance(value, list) else [value]
        for name, data in job["data"].items():
            values[name] = _data(widgets[name], folder / "input" / data)
        if "resume_from" in widgets:
            values["resume_from"] = [resume_from]
        result = by_id[job["node"]].execute(**values).result
    return lambda: _save(job["node"], result, job["name"]), schema.display_name


def _loaded(loader: Mapping[str, Any], loaded: dict[str, tuple], own: Mapping[str, Any]) -> Any:
    """What a node gives, of nodes above it and values; equal nodes run once."""
    key = json.dumps({part: value for part, value in loader.items() if part != "output"}, sort_keys=True)
    if key not in loaded:
        inputs = {
            name: _loaded(value, loaded, own) if isinstance(value, Mapping) else value
            for name, value in loader.get("inputs", {}).items()
        }
        loaded[key] = _run(_node(loader["node"], own), inputs)
    return loaded[key][loader.get("output", 0)]


def _node(name: str, own: Mapping[str, Any]) -> Any:
    import nodes

    if name in own:
        return own[name]
    if name not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.init_extra_nodes(init_api_nodes=False))
    if name not in nodes.NODE_CLASS_MAPPINGS:
        raise JobError(f"this ComfyUI has no node {name!r}, with which the job loads a model: install its pack here")
    return nodes.NODE_CLASS_MAPPINGS[name]


def _run(node: Any, inputs: dict[str, Any]) -> tuple:
    call = getattr(node if inspect.ismethod(getattr(node, node.FUNCTION)) else node(), node.FUNCTION)
    result = call(**inputs)
    return tuple(result) if isinstance(result, tuple) else tuple(result.result)


def _data(widget: Any, folder: Path) -> Any:
    """The values of one input from its folder, read when they are used, but for texts."""
    from comfy_api.latest import io
    from pack.nodes.files import contents, weights
    from pack.nodes.training.stored import Stored, digest
    from pack.nodes.training_jobs import conditionings
    from pack.nodes.training_jobs.folder import SAMPLES

    def stored(endings: tuple[str, ...], read_file: Callable[[Path], Any]) -> Stored:
        files = _files(folder, endings)
        return Stored(len(files), lambda i: read_file(files[i]), digest(*map(contents.digest, files)))

    if isinstance(widget, io.String.Input):
        return [path.read_text(encoding="utf-8").strip() for path in _files(folder, (".txt",))]
    if isinstance(widget, io.Mask.Input):
        return stored(_PICTURES, _mask)
    if isinstance(widget, io.Latent.Input):
        return stored((".safetensors",), lambda path: {"samples": weights.read(path)[0][SAMPLES]})
    if isinstance(widget, io.Conditioning.Input):
        return stored((".safetensors",), lambda path: conditionings.unpacked(*weights.read(path)))
    return stored(_PICTURES, _picture)


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    found = []
    if folder.is_dir():
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.name[0] != ".")
    if not found:
        raise JobError(f"{folder} has no file that ends with {', '.join(endings)}: copy the whole folder of the job")
    return found


def _picture(path: Path) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).float().div_(255)[None]


def _mask(path: Path) -> torch.Tensor:
    """[1, H, W] in 0..1."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"))).float().div_(255)[None]


def _save(node_id: str, result: tuple, name: str) -> None:
    """Write a training's result as its Save node does."""
    from pack.nodes.action_identifier.training_nodes import UnderstudySaveActionIdentifier
    from pack.nodes.files import weights
    from pack.nodes.fusion_embedding.training_nodes import UnderstudySaveFusion
    from pack.nodes.identity_prior.training_nodes import UnderstudySaveIdentityPrior
    from pack.nodes.video_identity.training_nodes import UnderstudySaveVideoIdentityAdapter

    first, *others = result
    if node_id == "UnderstudyTrainIdentityPrior":
        UnderstudySaveIdentityPrior.execute(first, others[0], name)
    elif node_id == "UnderstudyTrainActionIdentifier":
        UnderstudySaveActionIdentifier.execute(first, name)
    elif node_id in ("UnderstudyTrainFusionCombiner", "UnderstudyTrainFusionGenerator"):
        UnderstudySaveFusion.execute(first, name)
    elif node_id == "UnderstudyTrainVideoIdentityAdapter":
        UnderstudySaveVideoIdentityAdapter.execute(first, name)
    else:
        weights.save(first, {}, "loras", name)  # a LORA_MODEL, as Save LoRA Weights writes it
