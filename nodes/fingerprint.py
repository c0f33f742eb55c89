"""Short digests of a model's weights, to tell whether a file was trained with them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

_SAMPLED_WEIGHTS = 8  # tensors, spread over the model
_SAMPLED_VALUES = 16  # in each of them


def fingerprint(model: Any) -> str:
    """16 hex digits of a MODEL's key names, shapes and a few raw weights, without the LoRAs on it.

    Equal for equal files, different for another precision or another training.
    """
    originals = {key.removeprefix("diffusion_model."): backup.weight for key, backup in model.backup.items()}
    return weights_fingerprint(model.model.diffusion_model.state_dict(), originals)


def clip_fingerprint(clip: Any) -> str:
    """The same of a CLIP's text encoders."""
    originals = {key: moved.weight for key, moved in clip.patcher.backup.items()}
    return weights_fingerprint(clip.cond_stage_model.state_dict(), originals)


def weights_fingerprint(weights: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] = {}) -> str:
    """The same digest of any weights by name; where `originals` has a name, its tensor is used instead."""
    content = hashlib.sha256()
    for key in sorted(weights):
        content.update(f"{key} {tuple(weights[key].shape)}\n".encode())
    plain = [key for key in sorted(weights) if type(weights[key]) in (torch.Tensor, torch.nn.Parameter)]
    for key in plain[:: max(1, len(plain) // _SAMPLED_WEIGHTS)]:
        content.update(_sampled(originals.get(key, weights[key])))
    return content.hexdigest()[:16]


def _sampled(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().flatten()
    return values[:: max(1, values.numel() // _SAMPLED_VALUES)].cpu().float().numpy().tobytes()
