"""Identity priors on disk: ordinary LoRA files whose metadata names their subject and base model."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..consent import gate, record
from ..files import weights
from ..files.fitting import MisfitError, check_lora
from ..files.folders import LORAS
from ..files.kinds import LearnedKind, Shapes, Summary, made_now
from ..files.names import refused
from ..files.pickles import read_any
from ..fingerprint import fingerprint
from ..messages import tell
from ..patching import models
from ..subject_tokens import Subject

_ENTRY = "understudy_identity"
FOLDER = dataclasses.replace(LORAS, mark=f'"{_ENTRY}"'.encode())
_KIND = "LIPE identity prior (arXiv 2406.17236)"


def save(
    lora: Mapping[str, torch.Tensor], subject: Subject, filename_prefix: str, tags: str = "", author: str = ""
) -> Path:
    """Write `output/loras/<prefix>_00001_.safetensors`; returns its path. Raises as made_now and weights.save do."""
    ranks = sorted({weight.shape[0] for key, weight in lora.items() if key.endswith("lora_down.weight")})
    alphas = sorted({float(alpha) for key, alpha in lora.items() if key.endswith(".alpha")})
    content = {
        "token": subject.token, "class_noun": subject.class_noun, "captions": list(subject.captions),
        "base": subject.base,
    }
    metadata = {_ENTRY: json.dumps(content), "method": _KIND, "modelspec.trigger_phrase": subject.trigger}
    if len(ranks) == 1 and len(alphas) == 1:  # what kohya's tools look for
        metadata |= {
            "ss_network_module": "networks.lora", "ss_network_dim": str(ranks[0]), "ss_network_alpha": str(alphas[0])
        }
    metadata |= made_now(tags, author) | record.to_metadata(subject.consent)
    return weights.save(lora, metadata, FOLDER.name, filename_prefix)


def load(name: str) -> tuple[dict[str, torch.Tensor], Subject]:
    """Weights and subject of a listed file. Raises WeightFileError for a file that holds no prior."""
    path = FOLDER.find(name)
    tensors, metadata = read_any(path)
    if _ENTRY not in metadata:
        raise refused(path, "does not describe an identity", "Load it with Load LoRA, or choose a saved prior")
    try:
        subject = _described(metadata)
    except ValueError as error:
        raise refused(path, f"has no valid description of its identity ({error})", "Save the prior again") from error
    return tensors, dataclasses.replace(subject, consent=gate.read(metadata, path.name))


def _described(metadata: Mapping[str, str]) -> Subject:
    """The subject that a file names. Raises ValueError where it is not valid."""
    try:
        content = json.loads(metadata[_ENTRY])
        captions = tuple(str(caption) for caption in content["captions"])
        return Subject(str(content["token"]), str(content["class_noun"]), captions, str(content["base"]))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _summary(_shapes: Shapes, metadata: Mapping[str, str]) -> Summary | None:
    if _ENTRY not in metadata:
        return None
    subject = _described(metadata)
    return Summary(subject.base, subject.trigger)


def _misfit(model: Any, shapes: Shapes, _metadata: Mapping[str, str]) -> str:
    try:
        check_lora(model, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    except MisfitError as error:
        return str(error)
    return ""


KIND = LearnedKind("identity prior", FOLDER, _summary, _misfit)


def apply(model: Any, tensors: Mapping[str, torch.Tensor], subject: Subject, strength: float, name: str) -> Any:
    """A clone of `model` that knows the subject; warns where it was trained on another base.

    Raises WeightFileError, naming key and shapes, where the weights are another model's; the model is not touched.
    """
    try:
        check_lora(model, tensors)
    except MisfitError as error:
        problem = f"was made for another kind of model: {error}"
        raise refused(name, problem, "Load the model that it was trained on") from error
    if subject.base and fingerprint(model) != subject.base:
        warning = (
            f"{name} was trained on another base model, or on one of another precision, so the identity may show "
            "less: load the model that it was trained on"
        )
        tell("Load Identity Prior", [warning], logging.WARNING)
    return model if strength == 0 else models.with_lora(model, weights=tensors, strength=strength)
