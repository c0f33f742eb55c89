"""Trained adapters as the LORA_MODEL that the host, diffusers and kohya tools read."""

from __future__ import annotations

import comfy.utils
import torch

from .lora import Adapters

PREFIX = "diffusion_model."


def lora_model(adapters: Adapters, unet_config: dict) -> dict[str, torch.Tensor]:
    """Weights by key: kohya's names of diffusers' layers for UNets, the host's own for every other model.

    `…lora_down.weight` [rank, in], `…lora_up.weight` [out, rank] and `…alpha` (no dimensions), fp32 on the CPU.
    """
    diffusers = {ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(unet_config).items()}
    weights = {}
    for name, adapter in adapters.modules.items():
        theirs = diffusers.get(f"{name}.weight")
        if theirs is None:
            key = f"{PREFIX}{name}"
        else:
            key = "lora_unet_" + theirs.removesuffix(".weight").replace(".", "_")
        weights[f"{key}.lora_down.weight"] = adapter.down.detach().cpu().clone()
        weights[f"{key}.lora_up.weight"] = adapter.up.detach().cpu().clone()
        weights[f"{key}.alpha"] = torch.tensor(float(adapter.scale * adapters.config.rank))
    return weights
