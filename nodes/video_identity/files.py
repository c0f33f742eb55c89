"""Video identity adapters on disk: the official pickles, and safetensors of the community and of the pack."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..consent import gate, record
from ..files import weights
from ..files.folders import LORAS
from ..files.kinds import LearnedKind, Shapes, Summary, made_now
from ..files.names import refused
from ..files.pickles import read_any
from . import method, sampling
from .method import AdapterError, VideoAdapter, adapter_from

FOLDER = dataclasses.replace(LORAS, mark=rb"blocks\.\d{1,4}\.self_attn\.[qkv]_loras\.(down|up)\.weight")


def load(name: str) -> VideoAdapter:
    """The adapter in a listed file; weights stay in their type, on the CPU.

    Raises WeightFileError, naming the file and the first bad key, for any other kind of file.
    """
    path = FOLDER.find(name)
    tensors, metadata = read_any(path)
    try:
        adapter = adapter_from(tensors)
    except AdapterError as error:
        raise refused(path, f"is not a video identity adapter: {error}", "Choose another file") from error
    return dataclasses.replace(adapter, base=metadata.get("base", "")[:16], consent=gate.read(metadata, path.name))


def _summary(shapes: Shapes, metadata: Mapping[str, str]) -> Summary | None:
    size = method.size_of(shapes)
    return size and Summary(metadata.get("base", ""), f"{size[0]} blocks of width {size[1]}")


def _misfit(model: Any, shapes: Shapes, _metadata: Mapping[str, str]) -> str:
    try:
        network = sampling.wan_network(model)
    except ValueError as error:
        return str(error)
    size = len(network.blocks), network.dim
    return "" if method.size_of(shapes) == size else f"the model has {size[0]} blocks of width {size[1]}"


KIND = LearnedKind("video identity adapter", FOLDER, _summary, _misfit)


def save(adapter: VideoAdapter, filename_prefix: str, tags: str = "", author: str = "") -> Path:
    """Write `output/loras/<prefix>_00001_.safetensors` under the published names; returns its path.

    Raises what made_now and weights.save raise.
    """
    metadata = {
        "method": "Stand-In video identity adapter (arXiv 2508.07901)", "blocks": str(len(adapter.blocks)),
        "width": str(adapter.width), "base": adapter.base, **made_now(tags, author),
        **record.to_metadata(adapter.consent),
    }
    return weights.save(adapter.tensors(), metadata, FOLDER.name, filename_prefix)
