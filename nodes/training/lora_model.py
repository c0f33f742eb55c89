"""What was trained, as a LORA_MODEL: the key names are those that ComfyUI, diffusers and kohya's tools read."""

from __future__ import annotations

import comfy.utils
import torch

from .lora import LoraLayers
from .whole_network import WholeNetwork

PREFIX = "diffusion_model."
# Tells SDXL by its transformers: kohya's tools name its layers by the original blocks.
_SDXL_DEPTH = [0, 0, 2, 2, 10, 10]


def lora_model(trained: LoraLayers | WholeNetwork, unet_config: dict) -> dict[str, torch.Tensor]:
    """Weights by key, fp32 on the CPU.

    A LoRA: `…lora_down.weight` [rank, in], `…lora_up.weight` [out, rank] and `…alpha` (a scalar), under kohya's
    names for UNets (diffusers' layers, or SDXL's original ones) and ComfyUI's for every other model. A whole
    network: differences from the original weights, `….diff` and for a bias `….diff_b`, under ComfyUI's names.
    """
    if isinstance(trained, WholeNetwork):
        return {_difference_key(name): difference for name, difference in trained.differences().items()}
    diffusers = {name: theirs for theirs, name in comfy.utils.unet_to_diffusers(unet_config).items()}
    sdxl = list(unet_config.get("transformer_depth", ())) == _SDXL_DEPTH
    weights = {}
    for name, adapter in trained.modules.items():
        theirs = diffusers.get(f"{name}.weight")
        if theirs is None:
            key = f"{PREFIX}{name}"
        else:
            layer = name if sdxl else theirs.removesuffix(".weight")
            key = "lora_unet_" + layer.replace(".", "_")
        weights[f"{key}.lora_down.weight"] = adapter.down.detach().cpu().clone()
        weights[f"{key}.lora_up.weight"] = adapter.up.detach().cpu().clone()
        weights[f"{key}.alpha"] = torch.tensor(float(adapter.scale * trained.config.rank))
    return weights


def _difference_key(name: str) -> str:
    if name.endswith(".bias"):
        return f"{PREFIX}{name.removesuffix('.bias')}.diff_b"
    return f"{PREFIX}{name.removesuffix('.weight')}.diff"
