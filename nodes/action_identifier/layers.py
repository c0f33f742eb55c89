"""The places of a network's cross-attention layers, from its own structure: no count is assumed."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import comfy.ldm.wan.ar_model
import comfy.ldm.wan.model

from .method import Place


def places(network: Any) -> tuple[Place, ...]:
    """Where prompts enter this diffusion model, in the order in which they do.

    A UNet's transformer is one place, however many layers it has: 16 places in SD 1.5 and 2.1, 11 with 70 layers in
    SDXL. A Wan transformer has one in each block. Raises ValueError for any other kind of model.
    """
    # It runs its blocks past the host's block patches.
    causal = isinstance(network, comfy.ldm.wan.ar_model.CausalWanModel)
    if isinstance(network, comfy.ldm.wan.model.WanModel) and not causal:
        return tuple(Place("double_block", i, 1) for i in range(len(network.blocks)))
    found = tuple(_unet_places(network)) if hasattr(network, "input_blocks") else ()
    if not found:
        raise ValueError(
            f"model is a {type(network).__name__}, and action identifiers need a UNet with cross-attention, such as "
            "SD 1.5, SD 2.1 or SDXL, or a Wan model that is not autoregressive: connect one"
        )
    return found


def _unet_places(network: Any):
    groups = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    for kind, blocks in groups.items():
        for index, block in enumerate(blocks):
            transformers = comfy.ldm.modules.attention.SpatialTransformer
            layers = sum(len(part.transformer_blocks) for part in block or () if isinstance(part, transformers))
            if layers:
                yield Place(kind, index, layers)
