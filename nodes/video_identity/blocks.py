"""The patch of a Wan block whose self-attention sees references; apart, since it holds no tensor and knows no run."""

import functools
from collections.abc import Callable
from typing import Any

from ...kernels import restricted_attention
from ...kernels.restricted_attention import Reference
from ..patching.wan_blocks import OVERRIDE, AttentionOverride, WanBlockPatch

# record(q, k, v, references) of a block, all [B, T, H, D]
Record = Callable[..., None]

KEY = "understudy_video_identity"
REACHED = "understudy_video_identity_reached"  # a call's `ReachedBlocks`
RECORDER = "understudy_video_identity_recorder"  # a call's explaining.CallRecorder, where Explain Result asks


class ReachedBlocks:
    """The blocks of one call that met their references. An object, since ComfyUI copies the lists in its options."""

    def __init__(self) -> None:
        self.numbers: list[int] = []


class ReferenceBlockPatch(WanBlockPatch):
    """Runs a Wan block with the references of the call as further keys and values."""

    key = KEY

    def __call__(self, args: dict, extra: dict) -> dict:
        options = args["transformer_options"]
        references = options.get(KEY, {}).get(self.index)
        if references is None:
            return self._inner(args, extra)
        recorder = options.get(RECORDER)
        record = recorder and functools.partial(recorder.record, self.index)
        attention, acted = RestrictedAttention(references, options.get(OVERRIDE), record), []

        def original_block(block_args: dict) -> dict:
            """The block itself, which an earlier patch may run once, twice or not at all."""
            attention.uses = attention.period = 0
            out = extra["original_block"](block_args)
            attention.period = attention.uses
            acted.append(attention.uses > 0)
            return out

        options = {**options, OVERRIDE: attention}
        # A second patch from this pack, below one from another extension, must not add the references again.
        del options[KEY]
        options.pop(RECORDER, None)
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


class RestrictedAttention(AttentionOverride):
    """The override for one block in one call: its first use is the self-attention of the video.

    A checkpointed block runs again in the backward pass, with as many uses again: `period` uses are one run.
    """

    def __init__(self, references: tuple[Reference, ...], earlier: Any, record: Record | None = None):
        super().__init__(earlier)
        self.references = references
        self.record = record
        self.period = 0

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        first = self.uses % self.period == 0 if self.period else self.uses == 0
        self.uses += 1
        if not first:
            return self._inner(function, q, k, v, heads, *args, **kwargs)
        if args or kwargs.get("mask") is not None:
            raise RuntimeError(
                "this model masks its self-attention, which a video identity adapter cannot extend: use a Wan T2V, "
                "I2V or VACE model"
            )

        def by_heads(*rows):
            return (row.unflatten(-1, (heads, -1)) for row in rows)

        def attend(*rows):
            out = self._inner(function, *(row.flatten(2) for row in rows), heads, **kwargs)
            return out.unflatten(-1, (heads, -1))

        if self.record is not None:
            self.record(*by_heads(q, k, v), self.references)
        if all(reference.weight is None for reference in self.references):
            return restricted_attention.joint(*by_heads(q, k, v), self.references, attend).flatten(2)
        return restricted_attention.weighted(*by_heads(q, k, v), self.references).flatten(2)
