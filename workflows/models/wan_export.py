"""The files of the theatre's Wan: transformer and autoencoder for the host's own loaders, adapter for the pack's."""

import copy
import json
from pathlib import Path

import comfy.latent_formats
import numpy as np
import torch
import whole_clip
from half_files import LIMIT as LIMIT
from half_files import save_half
from half_files import sha256 as sha256
from pack.nodes.puppets import theatre


def save_dit(path: Path, tensors: dict[str, torch.Tensor], training: dict) -> None:
    """The transformer's weights with our marker; `training` (settings, steps) goes into the metadata."""
    # The host reads "transformer" itself: a host without this pack takes the file for a Wan of that text width.
    config = {"transformer": {"text_dim": theatre.TEXT_WIDTH}, "training": training}
    save_half(path, {**tensors, theatre.WAN_MARKER: torch.ones(1)}, {"config": json.dumps(config)})


def save_vae(path: Path, vae, mean: torch.Tensor, deviation: torch.Tensor, training: dict) -> None:
    """The autoencoder, so that latents of this `mean` and `deviation` [16] have Wan's own after encoding.

    The host's `process_latent_in` then gives the zero mean and unit deviation that the transformer learnt.
    """
    folded = copy.deepcopy(vae).float().cpu()
    wan = comfy.latent_formats.Wan21()
    scale = wan.latents_std.flatten() / deviation.cpu()
    whole_clip.fold(folded, wan.latents_mean.flatten() - mean.cpu() * scale, scale)
    save_half(path, folded.state_dict(), {"config": json.dumps({"training": training})})


def save_adapter(path: Path, tensors: dict[str, torch.Tensor], training: dict) -> None:
    """The video identity adapter under its published key names."""
    save_half(path, tensors, {"config": json.dumps({"training": training})})


def latent_rgb(latents: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Least-squares map [17, 3] from normalised latents [N, 16, ...] and a one to colours [N, 3, ...]."""
    flat, target = (np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) for array in (latents, colours))
    return np.linalg.lstsq(np.hstack([flat, np.ones((len(flat), 1))]), target, rcond=None)[0]
