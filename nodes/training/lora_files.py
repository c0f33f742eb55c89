"""What was trained as the LORA_MODEL that the host reads; adapters also in names of diffusers and kohya tools."""

from __future__ import annotations

import comfy.utils
import torch

from .lora import Adapters
from .whole_network import WholeNetwork

PREFIX = "diffusion_model."
# SDXL's by its transformers. kohya's tools train it in the original blocks, and write those names.
_SDXL_DEPTH = [0, 0, 2, 2, 10, 10]


def lora_model(trained: Adapters | WholeNetwork, unet_config: dict) -> dict[str, torch.Tensor]:
    """Weights by key, fp32 on the CPU.

    Adapters: `…lora_down.weight` [rank, in], `…lora_up.weight` [out, rank] and `…alpha` (no dimensions), under
    kohya's names for UNets, of diffusers' layers or SDXL's own, and the host's for every other model. A whole
    network: differences to its own weights, `….diff` and for a bias `….diff_b`, under the host's names.
    """
    if isinstance(trained, WholeNetwork):
        return {_difference_key(name): difference for name, difference in trained.differences().items()}
    diffusers = {ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(unet_config).items()}
    sdxl = list(unet_config.get("transformer_depth", ())) == _SDXL_DEPTH
    weights = {}
    for name, adapter in trained.modules.items():
        theirs = diffusers.get(f"{name}.weight")
        if theirs is None:
            key = f"{PREFIX}{name}"
        else:
            named = name if sdxl else theirs.removesuffix(".weight")
            key = "lora_unet_" + named.replace(".", "_")
        weights[f"{key}.lora_down.weight"] = adapter.down.detach().cpu().clone()
        weights[f"{key}.lora_up.weight"] = adapter.up.detach().cpu().clone()
        weights[f"{key}.alpha"] = torch.tensor(float(adapter.scale * trained.config.rank))
    return weights


def _difference_key(name: str) -> str:
    if name.endswith(".bias"):
        return f"{PREFIX}{name.removesuffix('.bias')}.diff_b"
    return f"{PREFIX}{name.removesuffix('.weight')}.diff"
