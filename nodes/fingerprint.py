"""A short name for the weights of a model, to tell whether a file was trained with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_SAMPLED_WEIGHTS = 8  # tensors looked into, spread over the model
_SAMPLED_VALUES = 16  # of each


def fingerprint(model: Any) -> str:
    """16 hex digits of a MODEL's key names, shapes and a few raw weights, LoRAs on it not counted.

    Equal for equal files; a file in another precision, or of another training, has its own.
    """
    originals = {key.removeprefix("diffusion_model."): kept.weight for key, kept in model.backup.items()}
    return weights_fingerprint(model.model.diffusion_model.state_dict(), originals)


def weights_fingerprint(weights: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] = {}) -> str:
    """The same of any weights by name; `originals` stand for those of their names."""
    content = hashlib.sha256()
    for key in sorted(weights):
        content.update(f"{key} {tuple(weights[key].shape)}\n".encode())
    plain = [key for key in sorted(weights) if type(weights[key]) in (torch.Tensor, torch.nn.Parameter)]
    for key in plain[:: max(1, len(plain) // _SAMPLED_WEIGHTS)]:
        content.update(_sampled(originals.get(key, weights[key])))
    return content.hexdigest()[:16]


def patches_fingerprint(model: Any) -> str:
    """16 hex digits of the LoRAs and other weights that are patched onto a MODEL; empty where there are none."""
    content = hashlib.sha256()
    for key in sorted(model.patches):
        for strength, patch, own, offset, _ in model.patches[key]:
            content.update(f"{key} {type(patch).__name__} {strength} {own} {offset}\n".encode())
            for part in _parts(getattr(patch, "weights", patch)):
                content.update(_sampled(part) if isinstance(part, torch.Tensor) else f"{part}\n".encode())
    return content.hexdigest()[:16] if model.patches else ""


def _sampled(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().flatten()
    return values[:: max(1, values.numel() // _SAMPLED_VALUES)].cpu().float().numpy().tobytes()


def _parts(value: Any) -> Iterator[torch.Tensor | str | int | float | None]:
    """The tensors, names and numbers of a patch, in their order."""
    if isinstance(value, torch.Tensor | str | int | float | None):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
