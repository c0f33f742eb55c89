"""Action identifiers on disk: safetensors files of the pack, and textual-inversion embeddings, read and written."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..consent import gate, record
from ..files import weights
from ..files.folders import WeightFolder
from ..files.kinds import LearnedKind, Shapes, Summary, made_now
from ..files.names import EXTENSION, refused
from ..files.pickles import read_any
from . import sampling
from .config import check_placeholder
from .method import ANY_ENCODER, ActionError, ActionIdentifier, Place

EMBEDDINGS = WeightFolder("embeddings")
_KIND = "understudy action identifier"
_KEY = "identifier."
_OFFSETS = "offsets"
_KINDS = ("input", "middle", "output", "double_block")
_EMBEDDING_PREFIX = f"{EMBEDDINGS.name}/"
# SDXL's two encoders in an embedding file, by the names under which ComfyUI tokenizes.
_CLIPS = {"l": ("clip_l", "text_encoders_0"), "g": ("clip_g", "text_encoders_1")}
_WIDTHS = {768: "l", 1280: "g"}
# An entry of an embedding of several tokens: pivotal tuning's `<s1>`, or one of a list, as pickles.py numbers them.
_TOKEN = re.compile(r"<[^<>]+>$|\d+\.")
_BUNDLED = re.compile(r"bundle_emb\..*\.(string_to_param\.\*|clip_l|clip_g)$")  # in a LoRA's file
_OF_BUNDLE = {"clip_l": "l", "clip_g": "g"}
_OTHER = "Choose an action identifier of this pack, or a textual-inversion embedding"


class _WithEmbeddings(WeightFolder):
    """The pack's identifiers, then ComfyUI's embeddings as `embeddings/NAME`."""

    def choices(self) -> list[str]:
        return [*super().choices(), *(f"{_EMBEDDING_PREFIX}{name}" for name in EMBEDDINGS.choices())]

    def find(self, name: str) -> Path:
        if name.startswith(_EMBEDDING_PREFIX) and name not in super().choices():
            return EMBEDDINGS.find(name.removeprefix(_EMBEDDING_PREFIX))
        return super().find(name)


FOLDER = _WithEmbeddings("action_identifiers", (EXTENSION,))


def load(name: str, placeholder: str = "") -> ActionIdentifier:
    """The identifier in a listed file; an embedding becomes one that is equal in all layers, called <NAME>.

    `placeholder` replaces the word that it was saved with. Raises WeightFileError, naming the file and what is wrong,
    for any other kind of file; ValueError for a placeholder that is not one word.
    """
    if placeholder:
        check_placeholder(placeholder)
        return dataclasses.replace(load(name), placeholder=placeholder)
    path = FOLDER.find(name)
    tensors, metadata = read_any(path, under="string_to_param")
    try:
        if metadata.get("kind") == _KIND:
            action = _identifier(tensors, metadata)
        else:
            action = _imported(tensors, path.stem)
        return dataclasses.replace(action, consent=gate.read(metadata, path.name))
    except ActionError as error:
        raise refused(path, f"is not an action identifier: {error}", _OTHER) from error


def save(action: ActionIdentifier, filename_prefix: str, tags: str = "", author: str = "") -> Path:
    """Write `output/action_identifiers/<prefix>_00001_.safetensors`; returns its path.

    Each encoder's tokens [places, tokens, width] under its name, and `offsets` behind them where there are any; the
    rest is metadata. Raises as made_now and weights.save do.
    """
    metadata = {
        "kind": _KIND, "method": "ADI action identifier (arXiv 2311.15841)", "placeholder": action.placeholder,
        "initial_word": action.initial_word, "base": action.base, "layers": json.dumps(action.places),
        **made_now(tags, author), **record.to_metadata(action.consent),
    }
    tensors = {f"{_KEY}{encoder}": tokens for encoder, tokens in action.tokens.items()}
    if action.offsets is not None:
        tensors[_OFFSETS] = action.offsets
    return weights.save(tensors, metadata, FOLDER.name, filename_prefix)


def export(action: ActionIdentifier, filename_prefix: str) -> Path:
    """Write the mean over the layers as `output/embeddings/<prefix>_00001_.safetensors`, for other programs. Ours.

    Keys: clip_l and clip_g for SDXL, else emb_params; [tokens, width]. Returns its path.
    """
    single = len(action.tokens) == 1
    tensors = {
        "emb_params" if single else _CLIPS.get(encoder, [encoder])[0]: tokens.float().mean(0)
        for encoder, tokens in action.tokens.items()
    }
    return weights.save(tensors, record.to_metadata(action.consent), EMBEDDINGS.name, filename_prefix)


def check_exportable(action: ActionIdentifier) -> None:
    """Raises ValueError where an embedding could not hold the action."""
    if action.offsets is not None:
        raise ValueError(
            f"{action.placeholder} was learned behind the text encoder, and an embedding holds only what goes into "
            "it: turn textual_inversion off, or train without behind_encoder"
        )


def _summary(_shapes: Shapes, metadata: Mapping[str, str]) -> Summary | None:
    if metadata.get("kind") != _KIND:
        return None
    check_placeholder(metadata.get("placeholder", ""))
    return Summary(metadata.get("base", ""), metadata["placeholder"])


def _misfit(model: Any, _shapes: Shapes, metadata: Mapping[str, str]) -> str:
    try:
        trained_for = _places(metadata.get("layers", ""))
        places = sampling.places(model.get_model_object("diffusion_model"))
    except ValueError as error:
        return str(error)
    return "" if trained_for in ((), places) else "its layers are those of another kind of model"


KIND = LearnedKind("action", FOLDER, _summary, _misfit)


def _identifier(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> ActionIdentifier:
    # In fp32: numbers of 8 bits cannot say whether they are finite. Whole numbers are refused later.
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    offsets = tensors.pop(_OFFSETS, None)
    foreign = sorted(key for key in tensors if not key.startswith(_KEY))
    if foreign:
        raise ActionError(f"it has {foreign[0]!r} beside its tokens")
    placeholder = metadata.get("placeholder", "")
    try:
        check_placeholder(placeholder)
    except ValueError as error:
        raise ActionError(str(error)) from error
    tokens = {key.removeprefix(_KEY): tensor for key, tensor in tensors.items()}
    return ActionIdentifier(
        placeholder, metadata.get("initial_word", ""), tokens, _places(metadata.get("layers", "")),
        metadata.get("base", ""), offsets=offsets,
    )


def _places(text: str) -> tuple[Place, ...]:
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ActionError("its metadata has no map of layers") from error
    if not isinstance(listed, list):
        raise ActionError("its map of layers is not a list")
    for entry in listed:
        triple = isinstance(entry, list) and len(entry) == 3 and entry[0] in _KINDS
        if not triple or not all(type(number) is int and number >= 0 for number in entry[1:]):
            raise ActionError(f"its map of layers has the entry {str(entry)[:60]}")
    return tuple(Place(*entry) for entry in listed)


def _imported(tensors: dict[str, torch.Tensor], stem: str) -> ActionIdentifier:
    """An embedding's [n, D] or [D] in a layout that ComfyUI reads, by encoder where the file has SDXL's two."""
    by_encoder = _by_encoder(tensors)
    if not by_encoder or any(
        tensor.ndim not in (1, 2) or not tensor.numel() for parts in by_encoder.values() for tensor in parts
    ):
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(tensors.items())[:3])
        raise ActionError(f"it holds {shapes}, which is not an embedding either")
    placeholder = "<" + "_".join("".join(c if c.isalnum() else " " for c in stem).split()) + ">"
    tokens = {
        encoder: torch.cat([part.float().reshape(1, -1, part.shape[-1]) for part in parts], dim=1)
        for encoder, parts in by_encoder.items()
    }
    return ActionIdentifier(placeholder, "", tokens)


def _by_encoder(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The vectors of each encoder, in the file's order; none if the keys are not those of an embedding."""
    named = {encoder: [tensors[key]] for encoder, keys in _CLIPS.items() for key in keys if key in tensors}
    for key, tensor in tensors.items():
        if bundled := _BUNDLED.match(key):
            named.setdefault(_OF_BUNDLE.get(bundled[1], ANY_ENCODER), []).append(tensor)
    if named:
        return named
    if len(tensors) > 1 and not all(_TOKEN.match(key) for key in tensors):
        return {}
    by_width: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        by_width.setdefault(tensor.shape[-1] if tensor.ndim else 0, []).append(tensor)
    if len(by_width) == 1:
        return {ANY_ENCODER: list(tensors.values())}
    return {_WIDTHS[width]: parts for width, parts in by_width.items()} if by_width.keys() == _WIDTHS.keys() else {}
