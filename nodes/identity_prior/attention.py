"""Where a model looks for the subject; apart from inversion.py and sampling.py, since the runs of both record it.

It is the model's cross-attention to the subject's tokens, or what the picture's rows attend to those where text and
picture are one sequence. A model with a recorder carries patches that hold nothing: what a call is to record travels
in `transformer_options` under KEY, and what it recorded leaves with it, so such a model may be cached, cloned and run
by several threads.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import WanI2VCrossAttention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...kernels.token_attention import token_attention
from ..inputs.ranges import select_numbers
from ..patching import joint_blocks, models, unet_layers, wan_blocks
from ..patching.unet_layers import CrossAttention
from ..patching.wan_blocks import OVERRIDE, AttentionOverride, WanBlockPatch
from .config import AUTO, MaskConfig
from .method import mean_map

KEY = "understudy_token_attention"
MASK_FIX = "connect a mask_text without clothes, raise the threshold, or connect your own `mask`"
# As in Prompt-to-Prompt: UNets know subjects best in the coarsest layers that have so many cells. On the theatre the
# maps of these overlap with the true masks by 0.69, those of layers with 8 cells by 0.48, each at its best threshold.
_BEST_CELLS = 16
# Ours: SD 1.5 has five such layers, SDXL 60 and Wan 14B 14; recording so many would cost more than they tell.
_MOST_LAYERS = 5


def layers_of(model: Any) -> tuple[CrossAttention, ...]:
    """The layers of a MODEL that attend to text, in the order in which they run; none where they cannot be read."""
    network = model.get_model_object("diffusion_model")
    kinds = (wan_blocks.cross_attentions, unet_layers.cross_attentions, joint_blocks.attentions)
    return next((layers for kind in kinds if (layers := kind(network))), ())


def need_no_subject(layers: Sequence[CrossAttention]) -> bool:
    """Whether texts for a model with these layers may come without the subject's positions: not every encoder of
    those of one sequence tells them.
    """
    return not layers or layers[0].part == joint_blocks.PART


def chosen_layers(layers: Sequence[CrossAttention], config: MaskConfig, longer_side: int) -> frozenset[int]:
    """Which of `layers` count for latents of `longer_side` cells. Raises ValueError where the model lacks one."""
    if config.layers.strip().lower() != AUTO:
        return select_numbers("layers", config.layers, len(layers))
    if layers[0].part in (wan_blocks.PART, joint_blocks.PART):
        third = len(layers) // 3
        return _spread(range(third, len(layers) - third))
    # The middle block alone is one layer: too little to go by.
    factors = {layer.factor for layer in layers if layer.part != "middle"}
    best = max((f for f in factors if longer_side / f >= _BEST_CELLS), default=min(factors))
    return _spread([i for i, layer in enumerate(layers) if layer.factor == best])


def _spread(candidates: Sequence[int]) -> frozenset[int]:
    """At most _MOST_LAYERS of them: the first, the last and some evenly between."""
    count = min(len(candidates), _MOST_LAYERS)
    return frozenset(candidates[round(i * (len(candidates) - 1) / max(1, count - 1))] for i in range(count))


def with_recorder(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` that records what a call asks for under KEY; calls that ask for nothing run as before."""
    network = model.get_model_object("diffusion_model")
    layers = list(enumerate(layers_of(model)))
    if joint_blocks.is_joint(network):
        return models.with_wrappers(model, key=KEY, wrappers={WrappersMP.APPLY_MODEL: _record_one_sequence})
    if not wan_blocks.is_wan(network):
        patches = {layer.place: functools.partial(RecordingAttentionPatch, i) for i, layer in layers}
        return models.with_cross_attention_patches(model, key=KEY, patches=patches)
    patches = {i: functools.partial(RecordingBlockPatch, i, use=_text_use(network.blocks[i])) for i, _ in layers}
    return models.with_block_patches(model, key=KEY, patches=patches)


def show_mask_text(guider: Any, mask_text: list) -> None:
    """Let a guider that is about to sample prepare `mask_text`, a CONDITIONING, beside its own prompts."""
    guider.conds[KEY] = comfy.sampler_helpers.convert_cond(mask_text)


def look_by_mask_text(guider: Any, x: torch.Tensor, sigma: torch.Tensor, options: Mapping[str, Any],
                      recorder: "AttentionRecorder") -> None:
    """Call the model at x [B, C, ...] and sigma [B] with the guider's mask text alone, for what `recorder` sees."""
    comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds[KEY]], x, sigma, recorder.added_to(options))


def _text_use(block: Any) -> int:
    """Which attention of a Wan block reads the text: after the video's own, and after a picture's in I2V models."""
    return 2 if isinstance(block.cross_attn, WanI2VCrossAttention) else 1


@dataclass(eq=False)
class AttentionRecorder:
    """What one call of the model is to record, and its maps: of each entry and layer [b, T, h, w], fp32.

    `entries` are subject_tokens.positions_by_entry's, and `shape` the latent's, [B, C, (T,) H, W].
    """

    entries: Mapping[Any, tuple[tuple[int, ...], int]]
    layers: Sequence[CrossAttention]
    config: MaskConfig
    shape: torch.Size

    def __post_init__(self) -> None:
        self.chosen = chosen_layers(self.layers, self.config, max(self.shape[-2:]))
        self.maps: dict[Any, list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    @torch.compiler.disable
    def record(
        self, index: int, q: torch.Tensor, k: torch.Tensor, heads: int, options: Mapping[str, Any],
        text: int | None = None, added: torch.Tensor | None = None,
    ) -> None:
        """Called by the patches: q [B, N, H * D] and k [B, M, H * D] of layer `index`.

        text: how many of the first columns are the text's, where it is not alone; added: the kernel's.
        """
        if index not in self.chosen:
            return
        if options.get("context_window") is not None:
            raise ValueError("context windows hide parts of the video: connect your own `mask`, or no windows")
        ids = options["uuids"]
        size = q.shape[0] // len(ids)  # samples per entry
        for i, entry in enumerate(ids):
            if entry not in self.entries:
                continue
            columns = _columns(*self.entries[entry], k.shape[1] if text is None else text, text is not None)
            part = slice(i * size, (i + 1) * size)
            mask = added[part] if added is not None and len(added) > 1 else added
            heat = token_attention(q[part], k[part], heads, columns, mask).unflatten(1, self._grid(index, q.shape[1]))
            with self._lock:
                self.maps.setdefault(entry, []).append(heat)

    def added_to(self, model_options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a model call that this recorder records."""
        options = {**model_options["transformer_options"], KEY: self}
        return {**model_options, "transformer_options": options}

    def heat(self, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """The mean map of the call, [B, T, h, w]; `earlier`, an earlier call's, where a cache such as EasyCache
        skipped the model. Raises RuntimeError where nothing was recorded before either.
        """
        if not self.maps:
            if earlier is not None:
                return earlier
            raise RuntimeError(
                "the model's attention to the subject was not seen: connect Encode Identity to the sampler's "
                "positive, remove nodes that replace the attention, put Reference Weight before Identity Mask Blend, "
                "or connect your own `mask`"
            )
        heats = [mean_map(maps, self.config.resolution) for maps in self.maps.values()]
        # Several devices may have run parts of one call.
        return torch.stack([heat.to(heats[0].device) for heat in heats]).mean(0)

    def _grid(self, index: int, count: int) -> tuple[int, int, int]:
        factor = self.layers[index].factor
        frames = self.shape[2] if len(self.shape) == 5 else 1
        grid = (frames, *(-(-side // factor) for side in self.shape[-2:]))
        if grid[0] * grid[1] * grid[2] != count:
            raise ValueError(
                f"layer {index} has {count} positions where the latent has {grid}: this model adds tokens or crops "
                "its latent, and cannot show where the subject is. Connect your own `mask`"
            )
        return grid


def _columns(positions: Sequence[int], tokens: int, count: int, joint: bool) -> list[int]:
    """Where the subject is among `count` columns of a text of so many tokens."""
    if count < tokens or not joint and count % tokens:
        raise ValueError(
            f"the model looks at {count} tokens and the prompt has {tokens}: remove the node or extension that adds "
            "tokens to this model's attention, or connect your own `mask`"
        )
    # ComfyUI repeats prompts of different lengths until they match; those of Flux.2 it fills up in front.
    starts = (count - tokens,) if joint else range(0, count, tokens)
    return [start + position for start in starts for position in positions]


def _record_one_sequence(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
):
    """ComfyUI's APPLY_MODEL: a look at every block of a call that is to be recorded."""
    recorder = transformer_options.get(KEY)
    if recorder is not None:
        network, earlier = executor.class_obj.diffusion_model, transformer_options.get(OVERRIDE)
        override = _JointRecordingOverride(recorder, network, c_crossattn.shape[1], earlier)
        transformer_options = {**transformer_options, OVERRIDE: override}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class _JointRecordingOverride(AttentionOverride):
    """Looks at the picture's rows of every block's attention in one call, whose text has `text` rows."""

    def __init__(self, recorder: AttentionRecorder, network: Any, text: int, earlier: Any):
        super().__init__(earlier)
        self.recorder, self.network, self.text = recorder, network, text

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        kwargs = joint_blocks.named(args, kwargs)
        options = kwargs.get("transformer_options") or {}
        if "block_index" in options:
            # ComfyUI's [B, H, T, D] of these models, or [B, T, H * D].
            rows, columns = (
                part.transpose(1, 2).flatten(2) if kwargs.get("skip_reshape") else part for part in (q, k)
            )
            end = columns.shape[1] - sum(options.get(joint_blocks.COUNTS) or ())
            mask = joint_blocks.added_mask(kwargs.get("mask"), q.dtype)
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, self.text : end]
            index = joint_blocks.number(self.network, options)
            self.recorder.record(index, rows[:, self.text : end], columns, heads, options, self.text, mask)
        return self._inner(function, q, k, v, heads, **kwargs)


@dataclass(eq=False)
class RecordingAttentionPatch:
    """The attention of one UNet cross-attention layer, ComfyUI's or an earlier patch's, and a look at it."""

    index: int
    earlier: Any
    key = KEY

    def __call__(self, q, k, v, options):
        recorder = options.get(KEY)
        if recorder is not None:
            recorder.record(self.index, q, k, options["n_heads"], options)
        if self.earlier is not None:
            return self.earlier(q, k, v, options)
        return optimized_attention(
            q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
        )


class RecordingBlockPatch(WanBlockPatch):
    """A Wan block with a look at its attention to the text, around whatever another patch does to its attention."""

    key = KEY

    def __init__(self, index: int, earlier: Any, use: int):
        super().__init__(index, earlier)
        self.use = use

    def __call__(self, args: dict, extra: dict) -> dict:
        block, recorder = extra["original_block"], args["transformer_options"].get(KEY)

        def recorded(args: dict) -> dict:
            options = args["transformer_options"]
            recording = _RecordingOverride(self, recorder, options)
            return block({**args, "transformer_options": {**options, OVERRIDE: recording}})

        if recorder is not None:
            extra = {**extra, "original_block": recorded}
        return self._inner(args, extra)


class _RecordingOverride(AttentionOverride):
    """Looks at one attention of the block and changes none."""

    def __init__(self, patch: RecordingBlockPatch, recorder: AttentionRecorder, options: Mapping[str, Any]):
        super().__init__(options.get(OVERRIDE))
        self.patch = patch
        self.recorder = recorder
        self.options = options

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        if self.uses == self.patch.use:
            self.recorder.record(self.patch.index, q, k, heads, self.options)
        self.uses += 1
        return self._inner(function, q, k, v, heads, *args, **kwargs)
