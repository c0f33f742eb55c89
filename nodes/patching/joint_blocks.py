"""Transformers whose text and picture are rows of one sequence: Flux and Qwen-Image. Which rows are whose.

A sequence has the rows of the text, then those of the sampled picture, then those of each reference picture.
"""

from collections.abc import Mapping
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

from .unet_layers import CrossAttention

PART = "joint_block"
# ComfyUI's key of transformer_options for how many rows each reference has, in their order.
COUNTS = "reference_image_num_tokens"
_POSITIONAL = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")


def is_joint(network: Any) -> bool:
    """Whether each block of this transformer attends once, in a sequence of text and picture."""
    return isinstance(network, (Flux, QwenImageTransformer2DModel))


def attentions(network: Any) -> tuple[CrossAttention, ...]:
    """The one attention of each block, in the order in which they run; none for another kind of network."""
    if not is_joint(network):
        return ()
    count = sum(len(getattr(network, name, ())) for name in ("double_blocks", "single_blocks", "transformer_blocks"))
    return tuple(CrossAttention(PART, i, 0, network.patch_size) for i in range(count))


def number(network: Any, options: Mapping[str, Any]) -> int:
    """The place among `attentions` of the block that runs, by what ComfyUI writes into `transformer_options`."""
    before = len(getattr(network, "double_blocks", ())) if options.get("block_type") == "single" else 0
    return before + options["block_index"]


def named(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All that an attention of ComfyUI is called with after q, k, v and heads, by name."""
    return {**kwargs, **dict(zip(_POSITIONAL, args, strict=False))}


def added_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as ComfyUI's attentions read it, as numbers that are added to scores, [.., .., N or 1, M]."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    return mask.unsqueeze(1) if mask.ndim == 3 else mask
