"""CONDITIONINGs as tensors and text, for a job's files."""

import json
from typing import Any

import torch

_OPTIONS = "options"


def packed(conditioning: list, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a CONDITIONING. Raises ValueError, naming the input, for what files cannot hold."""
    tensors: dict[str, torch.Tensor] = {}
    options: list[dict[str, Any]] = []
    for i, (text, others) in enumerate(conditioning):
        tensors[f"{i}"] = text
        options.append({})
        for key, value in others.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{i}.{key}"] = value
            elif value is None or isinstance(value, str | int | float | bool):
                options[i][key] = value
            else:
                raise ValueError(
                    f"{name} holds {key!r} of type {type(value).__name__}, which a job's files cannot hold: connect "
                    "CLIP Text Encode without further nodes, or run this training in ComfyUI"
                )
    return tensors, {_OPTIONS: json.dumps(options)}


def unpacked(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list:
    """The CONDITIONING that `packed` took apart."""
    conditioning = []
    for i, options in enumerate(json.loads(metadata[_OPTIONS])):
        prefix = f"{i}."
        others = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        conditioning.append([tensors[f"{i}"], {**options, **others}])
    return conditioning
