"""The weight file of a fusion: safetensors of this pack, or a published Lightning checkpoint as far as it fits."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import comfy.clip_vision

from ..consent import gate, record
from ..files import weights
from ..files.folders import WeightFolder
from ..files.kinds import LearnedKind, Shapes, Summary, made_now
from ..files.names import EXTENSION, refused
from ..files.pickles import read_any
from . import encoding, published
from .layout import FusionError, Weights, combiner_width, generator_sizes
from .method import LORA, WHOLE, Fusion

FOLDER = WeightFolder("fusion_embeddings", (EXTENSION, ".ckpt"))  # the published ones are Lightning's
_KIND = "understudy fusion"
_PARTS = ("combiner", "encoder", "generator", "unet")
_FIX = "Choose a fusion of this pack, or a published checkpoint"


def save(fusion: Fusion, filename_prefix: str, tags: str = "", author: str = "") -> Path:
    """Write `output/fusion_embeddings/<prefix>_00001_.safetensors`; returns its path.

    Keys begin with `combiner.`, `encoder.`, `generator.` or `unet.`, and one is `probe.embedding`; the metadata says
    whether `unet.` is a LoRA or a whole UNet. Raises as made_now and weights.save do.
    """
    tensors, metadata = packed(fusion)
    return weights.save(tensors, metadata | made_now(tags, author), FOLDER.name, filename_prefix)


def packed(fusion: Fusion) -> tuple[Weights, dict[str, str]]:
    """A file's tensors and metadata."""
    tensors = {}
    for part in _PARTS:
        content = getattr(fusion, part)
        if content is not None:
            content = content.get_sd() if part == "encoder" else content
            tensors |= {f"{part}.{key}": weight for key, weight in content.items()}
    metadata = {
        "kind": _KIND, "method": "FPDM fusion embedding (arXiv 2412.07333)", "unet": fusion.unet_kind or "none",
        "parts": ", ".join(fusion.parts), "prediction": fusion.prediction, "base": fusion.base,
        **record.to_metadata(fusion.consent),
    }
    if fusion.probe is not None:
        tensors["probe.embedding"] = fusion.probe
    if fusion.encoder is not None:
        metadata["encoder"] = json.dumps(fusion.encoder.config)
    return tensors, metadata


def load(name: str) -> tuple[Fusion, list[str]]:
    """The fusion in a listed file, its weights on the CPU, and lines that say what it holds and what did not fit.

    Raises WeightFileError, naming the file and the problem, for any other kind of file.
    """
    path = FOLDER.find(name)
    tensors, metadata = read_any(path)
    try:
        if metadata.get("kind") == _KIND:
            fusion = dataclasses.replace(unpacked(tensors, metadata), consent=gate.read(metadata, path.name))
            return fusion, [f"holds: {', '.join(fusion.parts)}"]
        if published.is_published(tensors):
            return published.convert(tensors, comfy.clip_vision.load_clipvision_from_sd)
    except FusionError as error:
        raise refused(path, f"is not a usable fusion: {error}", _FIX) from error
    raise refused(path, f"holds {sorted(tensors)[0]!r}, which is not part of a fusion", _FIX)


def _summary(_shapes: Shapes, metadata: Mapping[str, str]) -> Summary | None:
    if metadata.get("kind") != _KIND:
        return None
    return Summary(metadata.get("base", ""), metadata.get("parts", ""))


KIND = LearnedKind("fusion", FOLDER, _summary)


def unpacked(tensors: Weights, metadata: dict[str, str]) -> Fusion:
    """The Fusion of a file's tensors and metadata. Raises FusionError, naming the first key that does not fit."""
    parts: dict[str, Weights] = {}
    for key, weight in tensors.items():
        part, _, rest = key.partition(".")
        if part not in (*_PARTS, "probe") or not rest:
            raise FusionError(f"its {key!r} belongs to no part")
        # Combiner and generator compute in fp32; a file may store them in fp16.
        parts.setdefault(part, {})[rest] = weight.float() if part in ("combiner", "generator") else weight
    kind = metadata.get("unet", "none")
    if ("unet" in parts) != (kind in (LORA, WHOLE)):
        raise FusionError(f"its metadata says that its UNet is {kind[:40]!r}, and its weights say otherwise")
    if "combiner" in parts:
        combiner_width(parts["combiner"])
    if "generator" in parts:
        generator_sizes(parts["generator"])
    encoder = None
    if "encoder" in parts:
        try:
            description = json.loads(metadata.get("encoder", ""))
        except (ValueError, RecursionError) as error:
            raise FusionError("its metadata does not describe its image encoder") from error
        if not isinstance(description, dict):
            raise FusionError("its metadata does not describe its image encoder")
        encoder = encoding.rebuild(description, parts["encoder"])
    probe = parts.get("probe", {}).get("embedding")
    if "probe" in parts and (probe is None or probe.ndim != 1 or not probe.isfinite().all() or not probe.any()):
        raise FusionError("'probe.embedding' is not an embedding")
    return Fusion(
        parts.get("combiner"), encoder, parts.get("generator"), parts.get("unet"), kind if "unet" in parts else "",
        None if probe is None else probe.float(), metadata.get("prediction", "")[:8],
        metadata.get("base", "")[:16],
    )
