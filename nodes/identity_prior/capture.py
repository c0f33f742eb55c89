"""Where a model looks for the subject: its cross-attention to the subject's tokens, watched while it runs.

A watched model carries patches that hold nothing. What a call is to record travels in `transformer_options` under
KEY, and what it recorded leaves with it, so a watched model may be cached, cloned and run by several threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.ldm.modules.diffusionmodules.openaimodel as unet
import comfy.ldm.wan.model
import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention

from ...kernels.token_attention import token_attention
from ..patching import models
from .config import ALL_LAYERS, AUTO_LAYERS, MaskConfig, parse_layers
from .method import mean_map

KEY = "understudy_token_attention"
_OVERRIDE = "optimized_attention_override"
# Ours: UNets know subjects best in their coarse layers, of so many cells or more. In SD these have 16, as in
# Prompt-to-Prompt, since only the middle block is coarser; on the theatre 8 overlap better with the true masks.
_BEST_CELLS = 8
# Ours: SD 1.5 has five such layers, SDXL 60 and Wan 14B 14; watching so many would cost more than they tell.
_MOST_LAYERS = 5


class Layer(NamedTuple):
    """One cross-attention: its place in a UNet or its block in a transformer, and latent cells a side of its own."""

    place: Any
    factor: int


def layers_of(model: Any) -> tuple[Layer, ...]:
    """The cross-attentions to text of a MODEL, in the order in which they run; none where there is no such thing."""
    network = model.get_model_object("diffusion_model")
    if isinstance(network, comfy.ldm.wan.model.WanModel):
        return tuple(Layer(i, network.patch_size[1]) for i in range(len(network.blocks)))
    if not isinstance(network, unet.UNetModel):
        return ()
    found, factor = [], 1
    parts = (("input", network.input_blocks), ("middle", [network.middle_block]), ("output", network.output_blocks))
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for module in block if block is not None else ():
                if isinstance(module, SpatialTransformer):
                    depth = len(module.transformer_blocks)
                    found += [Layer((part, number, i), factor) for i in range(depth)]
                elif isinstance(module, unet.Downsample) or getattr(module, "updown", False) and part == "input":
                    factor *= 2
                elif isinstance(module, unet.Upsample) or getattr(module, "updown", False) and part == "output":
                    factor //= 2
    return tuple(found)


def chosen_layers(layers: Sequence[Layer], config: MaskConfig, longer_side: int) -> frozenset[int]:
    """Which of `layers` count for latents of `longer_side` cells. Raises ValueError where the model lacks one."""
    text = config.layers.strip().lower()
    if text == ALL_LAYERS:
        return frozenset(range(len(layers)))
    if text == AUTO_LAYERS:
        if isinstance(layers[0].place, int):
            third = len(layers) // 3
            return _spread(range(third, len(layers) - third))
        # The middle block alone is one layer: too little to go by.
        factors = {layer.factor for layer in layers if layer.place[0] != "middle"}
        best = max((f for f in factors if longer_side / f >= _BEST_CELLS), default=min(factors))
        return _spread([i for i, layer in enumerate(layers) if layer.factor == best])
    chosen = parse_layers(text) or frozenset()
    if max(chosen) >= len(layers):
        raise ValueError(f"layers is {config.layers!r} and this model has 0 to {len(layers) - 1}: choose among those")
    return chosen


def _spread(candidates: Sequence[int]) -> frozenset[int]:
    """At most _MOST_LAYERS of them, the first, the last and some evenly between."""
    count = min(len(candidates), _MOST_LAYERS)
    return frozenset(candidates[round(i * (len(candidates) - 1) / max(1, count - 1))] for i in range(count))


def watched(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that records what a call asks for under KEY; calls that ask for nothing run as before."""
    layers = layers_of(model)
    blocks, places = {}, {}
    network = model.get_model_object("diffusion_model")
    for i, layer in enumerate(layers):
        if isinstance(layer.place, int):
            # Self-attention comes first, then the picture's columns of I2V models, then the text's.
            kind = comfy.ldm.wan.model.WanI2VCrossAttention
            use = 2 if isinstance(network.blocks[layer.place].cross_attn, kind) else 1
            blocks[layer.place] = functools.partial(BlockPatch, i, use)
        else:
            places[layer.place] = functools.partial(CrossAttentionPatch, i)
    model = models.with_block_patches(model, key=KEY, patches=blocks)
    return models.with_cross_attention_patches(model, key=KEY, patches=places)


class Watch:
    """What one call of the model is to record, and its maps: of each entry and layer [b, T, h, w], fp32."""

    def __init__(self, entries: Mapping[Any, tuple[tuple[int, ...], int]], layers: Sequence[Layer],
                 config: MaskConfig, shape: torch.Size):
        self.entries = entries
        self.layers = layers
        self.config = config
        self.shape = shape
        self.chosen = chosen_layers(layers, config, max(shape[-2:]))
        self.maps: dict[Any, list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    @torch.compiler.disable
    def record(self, index: int, q: torch.Tensor, k: torch.Tensor, heads: int, options: Mapping[str, Any]) -> None:
        """Called by the patches: q [B, N, H * D] and k [B, M, H * D] of layer `index`."""
        if index not in self.chosen:
            return
        if options.get("context_window") is not None:
            raise ValueError("context windows hide parts of the video: connect your own `mask`, or no windows")
        ids = options["uuids"]
        for part, entry in enumerate(ids):
            if entry not in self.entries:
                continue
            asked, tokens = self.entries[entry]
            rows = slice(part * q.shape[0] // len(ids), (part + 1) * q.shape[0] // len(ids))
            if k.shape[1] % tokens:
                raise ValueError(
                    f"the model looks at {k.shape[1]} tokens and the prompt has {tokens}: remove the node or "
                    "extension that adds tokens to this model's cross-attention, or connect your own `mask`"
                )
            # The host repeats prompts of unlike lengths until they match.
            repeated = [column + start for start in range(0, k.shape[1], tokens) for column in asked]
            heat = token_attention(q[rows], k[rows], heads, repeated).unflatten(1, self._grid(index, q.shape[1]))
            with self._lock:
                self.maps.setdefault(entry, []).append(heat)

    def added_to(self, model_options: Mapping[str, Any]) -> dict[str, Any]:
        """These options of a call of the model, so that the call is recorded."""
        options = {**model_options["transformer_options"], KEY: self}
        return {**model_options, "transformer_options": options}

    def heat(self, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """The mean map of the call, [B, T, h, w]; `earlier`, an earlier call's, where a cache such as EasyCache
        skipped the model. Raises RuntimeError where nothing was recorded before either.
        """
        if not self.maps and earlier is not None:
            return earlier
        if not self.maps:
            raise RuntimeError(
                "the model's cross-attention to the subject was not seen: give the sampler's positive the output of "
                "Encode Identity, and remove nodes that replace the attention, or connect your own `mask`"
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
                f"layer {index} has {count} places where the latent has {grid}: this model adds tokens or crops its "
                "latent, and cannot show where the subject is. Connect your own `mask`"
            )
        return grid


class CrossAttentionPatch:
    """What stands for the attention of one UNet cross-attention: the host's own, or an earlier patch's."""

    key = KEY

    def __init__(self, index: int, earlier: Any):
        self.index = index
        self.earlier = earlier

    def __call__(self, q, k, v, options):
        watch = options.get(KEY)
        if watch is not None:
            watch.record(self.index, q, k, options["n_heads"], options)
        if self.earlier is not None:
            return self.earlier(q, k, v, options)
        return optimized_attention(
            q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
        )


class BlockPatch:
    """What stands for one block of a Wan model: the block, or an earlier patch of it, with its attention watched."""

    key = KEY

    def __init__(self, index: int, use: int, earlier: Any):
        self.index = index
        self.use = use
        self.earlier = earlier

    def __call__(self, args: dict, extra: dict) -> dict:
        block, watch = extra["original_block"], args["transformer_options"].get(KEY)

        def watched(given: dict) -> dict:
            """The block itself, watched around whatever another patch does to its attention."""
            options = given["transformer_options"]
            watching = _WatchedUse(self, watch, options)
            return block({**given, "transformer_options": {**options, _OVERRIDE: watching}})

        if watch is not None:
            extra = {**extra, "original_block": watched}
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)


class _WatchedUse:
    """The host's attention override of one block in one call: it looks at one use and changes none."""

    def __init__(self, patch: BlockPatch, watch: Watch, options: Mapping[str, Any]):
        self.patch = patch
        self.watch = watch
        self.options = options
        self.uses = 0

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        if self.uses == self.patch.use:
            self.watch.record(self.patch.index, q, k, heads, self.options)
        self.uses += 1
        earlier = self.options.get(_OVERRIDE)
        if earlier is None:
            return function(q, k, v, heads, *args, **kwargs)
        return earlier(function, q, k, v, heads, *args, **kwargs)
