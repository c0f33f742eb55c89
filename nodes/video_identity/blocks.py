"""The patch of a Wan block whose self-attention sees references; apart, since it holds no tensor and knows no run."""

from __future__ import annotations

import functools
from typing import Any

from ...kernels import restricted_attention
from ...kernels.restricted_attention import Reference

KEY = "understudy_video_identity"
REACHED = "understudy_video_identity_reached"  # a call's `ReachedBlocks`
OVERRIDE = "optimized_attention_override"


def patches(network: Any) -> dict[int, Any]:
    """What makes the patch of each block of a Wan transformer, for `models.with_block_patches`."""
    return {i: functools.partial(BlockPatch, i) for i in range(len(network.blocks))}


class ReachedBlocks:
    """The blocks of one call that met their references. An object, since ComfyUI copies the lists in its options."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


class BlockPatch:
    """Runs a block, or an earlier patch of it, with the references of the call as further keys and values.

    Since it holds no tensor and knows no run, a patched model may be cached, cloned and compiled.
    """

    key = KEY

    def __init__(self, index: int, earlier: Any):
        self.index = index
        self.earlier = earlier

    def __call__(self, args: dict, extra: dict) -> dict:
        options = args["transformer_options"]
        references = options.get(KEY, {}).get(self.index)
        if references is None:
            return self._inner(args, extra)
        attention, acted = RestrictedAttention(references, options.get(OVERRIDE)), []

        def original_block(block_args: dict) -> dict:
            """The block itself, which an earlier patch may run once, twice or not at all."""
            attention.uses = attention.period = 0
            out = extra["original_block"](block_args)
            attention.period = attention.uses
            acted.append(attention.uses > 0)
            return out

        options = {**options, OVERRIDE: attention}
        # A second patch of ours, under another extension's, must not add the references again.
        del options[KEY]
        if (reached := options.pop(REACHED, None)) is not None:
            reached.numbers.append(self.index)
        out = self._inner({**args, "transformer_options": options}, {**extra, "original_block": original_block})
        # A skipped block returns its input; any other result comes from an attention that we missed.
        if not all(acted) or (not acted and out["img"] is not args["img"]):
            raise RuntimeError(
                f"block {self.index} of this model did not use ComfyUI's attention, so the identity could not act: "
                "remove the node or extension that replaces the model's self-attention"
            )
        return out

    def _inner(self, args: dict, extra: dict) -> dict:
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)


class RestrictedAttention:
    """ComfyUI's attention override for one block in one call: its first use is the self-attention of the video.

    A checkpointed block runs again in the backward pass, with as many uses again: `period` uses are one run.
    """

    def __init__(self, references: tuple[Reference, ...], earlier: Any):
        self.references = references
        self.earlier = earlier
        self.uses = 0
        self.period = 0

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        def user_attention(q, k, v):
            if self.earlier is None:
                return function(q, k, v, heads, *args, **kwargs)
            return self.earlier(function, q, k, v, heads, *args, **kwargs)

        first = self.uses % self.period == 0 if self.period else self.uses == 0
        self.uses += 1
        if not first:
            return user_attention(q, k, v)
        if args or kwargs.get("mask") is not None:
            raise RuntimeError("this model masks its self-attention, to which the video identity adapter cannot add")

        def by_heads(*rows):
            return (row.unflatten(-1, (heads, -1)) for row in rows)

        if all(reference.weight is None for reference in self.references):
            return restricted_attention.joint(
                *by_heads(q, k, v), self.references,
                lambda *rows: user_attention(*(row.flatten(2) for row in rows)).unflatten(-1, (heads, -1)),
            ).flatten(2)
        return restricted_attention.weighted(*by_heads(q, k, v), self.references).flatten(2)
