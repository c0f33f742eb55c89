"""The files of the theatre's Wan: transformer and autoencoder for the host's own loaders, adapter for the pack's."""

import copy
import hashlib
import json
import os
from pathlib import Path

import comfy.latent_formats
import numpy as np
import torch
import whole_clip
from pack.nodes.puppets import theatre
from safetensors.torch import save_file

LIMIT = 16 * 2**20  # bytes a file


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """fp16, whole or not at all. Raises ValueError for a file over the limit or a value that fp16 cannot hold."""
    half = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in tensors.items()}
    if bad := [key for key, value in half.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path.name}: {bad[0]} is not finite in fp16; nothing was written")
    if (size := sum(value.nbytes for value in half.values())) > LIMIT - 2**18:
        raise ValueError(f"{path.name} would have {size} bytes, over {LIMIT}; nothing was written")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(half, temporary, {"format": "pt", **metadata})
    os.replace(temporary, path)


def save_dit(path: Path, tensors: dict[str, torch.Tensor], training: dict) -> None:
    """The transformer's weights with our marker; `training` (settings, steps) goes into the metadata."""
    # The host reads "transformer" itself: a host without this pack takes the file for a Wan of that text width.
    config = {"transformer": {"text_dim": theatre.TEXT_WIDTH}, "training": training}
    _save(path, {**tensors, theatre.WAN_MARKER: torch.ones(1)}, {"config": json.dumps(config)})


def save_vae(path: Path, vae, mean: torch.Tensor, deviation: torch.Tensor, training: dict) -> None:
    """The autoencoder, so that latents of this `mean` and `deviation` [16] have Wan's own after encoding.

    The host's `process_latent_in` then gives the zero mean and unit deviation that the transformer learnt.
    """
    folded = copy.deepcopy(vae).float().cpu()
    wan = comfy.latent_formats.Wan21()
    scale = wan.latents_std.flatten() / deviation.cpu()
    whole_clip.fold(folded, wan.latents_mean.flatten() - mean.cpu() * scale, scale)
    _save(path, folded.state_dict(), {"config": json.dumps({"training": training})})


def save_adapter(path: Path, tensors: dict[str, torch.Tensor], training: dict) -> None:
    """The video identity adapter under its published key names."""
    _save(path, tensors, {"config": json.dumps({"training": training})})


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def latent_rgb(latents: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Least-squares map [17, 3] from normalised latents [N, 16, ...] and a one to colours [N, 3, ...]."""
    flat, target = (np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) for array in (latents, colours))
    return np.linalg.lstsq(np.hstack([flat, np.ones((len(flat), 1))]), target, rcond=None)[0]
