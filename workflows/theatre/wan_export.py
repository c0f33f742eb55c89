"""The files of the theatre's Wan: transformer and autoencoder for the host's own loaders, adapter for the pack's."""

import copy
import dataclasses
import json
from pathlib import Path

import comfy.latent_formats
import numpy as np
import torch
import wan_stages as stages
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


def _preview(config: stages.Config, clips: np.ndarray, mean, deviation) -> np.ndarray:
    """The map of `latent_rgb`, fitted to 48 training clips."""
    takes = [stages.clip_takes(i) for i in range(min(48, len(clips)))]
    pixels = stages.to_pixels(np.stack([stages.clip_frames(shown, config.size) for shown in takes]), "cpu")
    normalised = (clips[:len(takes)] - mean[:, None, None, None]) / deviation[:, None, None, None]
    return latent_rgb(normalised, stages.grouped(pixels).numpy())


def export(
    folder: Path, config: stages.Config, device, transformer: Path, autoencoder: Path, encoder: Path,
) -> None:
    """Writes both files from what was trained in `folder`, and prints what SOURCES.md and theatre.py say of them."""
    _, clips = stages.latents(folder, config)
    mean, deviation = stages.statistics(clips)
    vae = stages.trained_vae(folder, config, device)["vae"]
    state = torch.load(folder / "likeness.pt", map_location="cpu", weights_only=True)
    training = {**dataclasses.asdict(config), "steps": state["done"], "text_encoder": sha256(encoder)}
    save_vae(autoencoder, vae, mean, deviation, training)
    save_dit(transformer, state["modules"]["average"], training)
    for path in (transformer, autoencoder):
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, sha256 {sha256(path)}")
    losses = [round(loss, 4) for _, loss in state["log"][-3:]]
    print(f"transformer step {state['done']} of the last stage, last losses {losses}")
    print(f"PSNR {stages.picture_psnr(vae, folder, config, device):.2f} dB on pictures, "
          f"{stages.clip_psnr(vae, config, device):.2f} dB on clips")
    print("latent to RGB:", np.round(_preview(config, clips, mean.numpy(), deviation.numpy()), 4).tolist())
