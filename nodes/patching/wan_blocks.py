"""The blocks of a Wan transformer: which models run patches of them, and what all such patches have in common."""

import functools
from typing import Any

from comfy.ldm.wan.ar_model import CausalWanModel
from comfy.ldm.wan.model import WanAttentionBlock, WanAttentionBlockAudio, WanModel

from .models import MakePatch
from .unet_layers import CrossAttention

PART = "double_block"
# The key of ComfyUI's transformer_options for a function that is called in place of every attention.
OVERRIDE = "optimized_attention_override"
# They attend once each to the video, a picture, the text and a sound, in this order.
_BLOCKS = (WanAttentionBlock, WanAttentionBlockAudio)


def is_wan(network: Any) -> bool:
    """Whether this is a Wan transformer, or one of its relatives."""
    return isinstance(network, WanModel)


def runs_patches(network: Any) -> bool:
    """Whether patches can act on the blocks of this Wan transformer: the autoregressive one calls them directly, and
    those of some relatives, such as WanAnimate2Model, attend to the video in several parts.
    """
    return not isinstance(network, CausalWanModel) and all(type(block) in _BLOCKS for block in network.blocks)


def cross_attentions(network: Any) -> tuple[CrossAttention, ...]:
    """One layer that reads the prompt in each block; none where it is not a Wan transformer that runs patches."""
    if not is_wan(network) or not runs_patches(network):
        return ()
    return tuple(CrossAttention(PART, i, 0, network.patch_size[1]) for i in range(len(network.blocks)))


class WanBlockPatch:
    """Base of what runs in place of one block: the block itself, or the patch of it that was there before.

    It holds no tensor and knows no run, so a patched model may be cached, cloned and compiled. A subclass names its
    `key`, and changes in `__call__` what `_inner` is given.
    """

    key: str

    def __init__(self, index: int, earlier: Any):
        self.index = index
        self.earlier = earlier

    @classmethod
    def for_every_block(cls, network: Any) -> dict[int, MakePatch]:
        """For `models.with_block_patches`: what makes the patch of each block."""
        return {i: functools.partial(cls, i) for i in range(len(network.blocks))}

    def _inner(self, args: dict, extra: dict) -> dict:
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)


class AttentionOverride:
    """Base of an OVERRIDE for one block in one call, around the one that was there before, or None.

    `uses` counts the attentions of the block: the video's own comes first, then those to a picture or a text.
    """

    def __init__(self, earlier: Any):
        self.earlier = earlier
        self.uses = 0

    def _inner(self, function, *args, **kwargs):
        """The attention as it is without this override."""
        return function(*args, **kwargs) if self.earlier is None else self.earlier(function, *args, **kwargs)
