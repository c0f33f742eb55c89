"""The cross-attention layers of a UNet, from its own structure: no number of layers is assumed."""

from typing import Any, NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample


class CrossAttention(NamedTuple):
    """One layer that reads the prompt, where ComfyUI's patches know it: transformer number `transformer` of block
    number `block` in a part of the network, "input", "middle" or "output" of a UNet.

    `factor` is how many latent cells a side of one of the layer's own positions has.
    """

    part: str
    block: int
    transformer: int
    factor: int

    @property
    def place(self) -> tuple[str, int, int]:
        """The layer's key among ComfyUI's patches."""
        return self[:3]


def cross_attentions(network: Any) -> tuple[CrossAttention, ...]:
    """Those of a diffusion model in the order in which they run; none where it is not a UNet for pictures: those of
    Stable Video Diffusion read no text.
    """
    if not isinstance(network, UNetModel):
        return ()
    layers, factor = [], 1
    parts = (("input", network.input_blocks), ("middle", [network.middle_block]), ("output", network.output_blocks))
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for module in block if block is not None else ():
                if isinstance(module, SpatialVideoTransformer):
                    return ()
                if isinstance(module, SpatialTransformer):
                    layers += [CrossAttention(part, number, i, factor) for i in range(len(module.transformer_blocks))]
                elif isinstance(module, Downsample) or getattr(module, "updown", False) and part == "input":
                    factor *= 2
                elif isinstance(module, Upsample) or getattr(module, "updown", False) and part == "output":
                    factor //= 2
    return tuple(layers)
