"""Where prompts enter a network: apart, since method.py may not know ComfyUI, and sampling and training both ask."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..patching import unet_layers, wan_blocks
from .method import Place


def places(network: Any) -> tuple[Place, ...]:
    """The places of this diffusion model's cross-attention layers, in the order in which they run.

    A UNet's transformer is one place, however many layers it has: 16 places in SD 1.5 and 2.1, 11 with 70 layers in
    SDXL. A Wan transformer has one in each block. Raises ValueError for any other kind of model.
    """
    layers = wan_blocks.cross_attentions(network) or unet_layers.cross_attentions(network)
    if not layers:
        raise ValueError(
            f"model is a {type(network).__name__}, and action identifiers need a UNet with cross-attention, such as "
            "SD 1.5, SD 2.1 or SDXL, or a Wan model that is not autoregressive: connect one"
        )
    counts = Counter((layer.part, layer.block) for layer in layers)
    return tuple(Place(part, block, count) for (part, block), count in counts.items())
