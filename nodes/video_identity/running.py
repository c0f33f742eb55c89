"""Video identity inside a sampling run: what the host calls, and when the reference is computed.

Before each call of the model the references' keys and values are looked up, or computed once and kept until the run
ends. They travel in `transformer_options` to the blocks, whose first attention, the self-attention, then sees them.
Nothing of the model is replaced: its own blocks run with an attention function around the user's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.wan.model
import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...kernels.restricted_attention import Reference
from ..patching import models
from . import blocks, method
from .blocks import KEY as KEY
from .method import Identity

# Tested with tiny weights; other relatives of WanModel run with a note, and those listed below cannot.
VERIFIED = ("WanModel", "VaceWanModel", "CameraWanModel")
# It runs its blocks from a cache of its own, past the host's block patches.
REFUSED = ("CausalWanModel",)

# Schedules and percents round differently; a step that lies on a limit counts as on it.
_SIGMA_TOLERANCE = 1e-5


def apply(model: Any, identity: Identity) -> Any:
    """A clone of `model` that shows the identity, beside those which it shows already; `model` if it does nothing.

    Raises ValueError, naming the input and the fix, where model, adapter, reference and blocks do not fit together.
    """
    network = wan_network(model)
    identity.adapter.check(network.dim, len(network.blocks))
    method.kept_blocks(identity.config, len(network.blocks))
    check_channels(model, identity.latent, "reference")
    if identity.mask is not None and type(network).__name__ not in VERIFIED:
        raise ValueError(f"masks are not known to fit a {type(network).__name__}: disconnect `mask`")
    if identity.off:
        if identity.config.strength:
            # As Load Image gives it for a picture without alpha: asked for or not, it cannot be seen in the video.
            logging.warning("[Understudy] the mask is 0 everywhere, so Apply Video Identity shows no reference")
        return model
    earlier = models.attachment(model, KEY)
    identities = VideoIdentities((*(earlier.identities if earlier else ()), identity))
    wrappers = {
        WrappersMP.APPLY_MODEL: identities.apply_model, WrappersMP.PREPARE_SAMPLING: identities.prepare_sampling,
    }
    callbacks = {CallbacksMP.ON_CLEANUP: identities.cleanup}
    patched = models.with_wrappers(model, key=KEY, wrappers=wrappers, callbacks=callbacks, attachment=identities)
    return models.with_block_patches(patched, key=KEY, patches=blocks.patches(network))


def extended(model: Any) -> Any:
    """A clone of `model` whose blocks see what a call brings under KEY; nothing is brought by itself."""
    return models.with_block_patches(model, key=KEY, patches=blocks.patches(wan_network(model)))


def wan_network(model: Any) -> Any:
    """The Wan transformer of a MODEL. Raises ValueError where it is none whose attention can be extended."""
    network = model.get_model_object("diffusion_model")
    name = type(network).__name__
    if not isinstance(network, comfy.ldm.wan.model.WanModel):
        raise ValueError(f"model is a {name}, and the video identity adapter needs a Wan video model: connect one")
    if name in REFUSED:
        raise ValueError(f"a {name} does not let its attention be extended: connect a Wan T2V, I2V or VACE model")
    if name not in VERIFIED:
        logging.warning("[Understudy] the video identity adapter is not verified with %s", name)
    return network


def check_channels(model: Any, latent: torch.Tensor, name: str) -> None:
    """Raises ValueError, naming the input, where a latent [1, C, ...] is of another VAE than the model's."""
    channels = model.model.latent_format.latent_channels
    if latent.shape[1] != channels:
        raise ValueError(
            f"{name} has {latent.shape[1]} channels and the model's latents have {channels}: encode it with the VAE "
            "of this model"
        )


class VideoIdentities:
    """The references of one patched model, in the order of its nodes, and what was computed for them in this run."""

    def __init__(self, identities: tuple[Identity, ...]):
        self.identities = identities
        self.cache = method.ReferenceCache()
        self._begin()

    def _begin(self) -> None:
        self._size: tuple[int, ...] | None = None  # frames, height and width of the latents of this run
        self._retained: list[int] = []  # frames of the video that context windows keep at their places
        self._given: set[int] = set()  # blocks that were to act in this run
        self._acted: set[int] = set()

    def cleanup(self, _patcher: Any) -> None:
        """The host's ON_CLEANUP: nothing outlives a run."""
        if missing := sorted(self._given - self._acted):
            logging.warning(
                "[Understudy] the reference did not act in blocks %s: either a node after Apply Video Identity "
                "replaces them, then put Apply Video Identity after it; or a cache such as EasyCache skipped every "
                "step in which it acts", missing
            )
        self.cache.clear()
        self._begin()

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """The host's PREPARE_SAMPLING: the estimate of memory grows by the cache, as columns of the latent."""
        shape = list(noise_shape)
        self._retained = getattr(model.model_options.get("context_handler"), "latent_retain_index_list", [])
        if len(shape) == 5:
            self._size = tuple(shape[-3:])
            # The width, since context windows overwrite the frames; of the whole batch, which shares one cache.
            column = model.model.memory_required([*shape[:-1], 1])
            entries = _most_entries(conds, tuple(noise_shape[-2:]))
            shape[-1] += math.ceil(self.cache_bytes(model.model) * entries / column)
        return executor(model, shape, conds, *args, **kwargs)

    def cache_bytes(self, base: Any) -> int:
        """What the keys and values of every reference take."""
        network = base.diffusion_model
        total = 0
        for identity in self.identities:
            rows = math.prod(-(-n // p) for n, p in zip(identity.latent.shape[2:], network.patch_size, strict=True))
            kept = len(method.kept_blocks(identity.config, len(network.blocks)))
            total += 2 * kept * rows * network.dim * base.get_dtype_inference().itemsize
        return total

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """The host's APPLY_MODEL: hand each block its references, or leave a call alone that none acts in."""
        base = executor.class_obj
        acting = [identity for identity in self.identities if _acts(identity, base, t)]
        references = self._references(base, acting, x, transformer_options, kwargs) if acting else {}
        acted = blocks.Acted()
        if references:
            transformer_options = {**transformer_options, KEY: references, blocks.ACTED: acted}
        result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        self._given.update(references)
        self._acted.update(acted.blocks)
        return result

    def _references(self, base, identities, x, options, conditions) -> dict[int, tuple[Reference, ...]]:
        """Each block's references for this call; a reference without weight anywhere in it is left out."""
        seen: dict[int, list[Reference]] = {}
        for identity in identities:
            weight = self._weight(base, identity, x, options, conditions)
            if weight is not None:
                if not weight.any():
                    continue
                weight = weight.to(x.device)
            for i, (k, v) in self._rows(base, identity, x, options).items():
                seen.setdefault(i, []).append(Reference(k, v, weight))
        return {i: tuple(references) for i, references in seen.items()}

    def _rows(self, base, identity, x, options) -> method.Rows:
        """Keys and values of a reference at the size of this video, from the cache or computed now."""
        height, width = token_grid(base.diffusion_model, x)
        dtype = base.get_dtype_inference()
        rope = options.get("rope_options") or {}
        key = (
            "rows", identity.digest, identity.adapter, identity.config.blocks, height, width, dtype, x.device,
            tuple(sorted(rope.items())),
        )
        keep = method.kept_blocks(identity.config, len(base.diffusion_model.blocks))

        def compute() -> method.Rows:
            # Copied, since a latent format may work in place.
            latent = base.process_latent_in(identity.latent.clone()).to(x.device)
            # A backward pass keeps little of it, as where the host's own blocks are computed twice.
            recompute = torch.is_grad_enabled()
            return reference_rows(base, identity.adapter, latent, keep, (height, width), options, recompute)

        if torch.is_grad_enabled():  # somebody trains through this model: its weights and graph are the step's own
            return compute()
        return self.cache.get(base, key, compute, _weights_state(base))

    def _weight(self, base, identity, x, options, conditions) -> torch.Tensor | None:
        """The weight of each token of this call, [N], or None for the published 1 everywhere."""
        strength = identity.config.strength
        if identity.mask is None:
            if strength == 1:
                return None
            # One number serves however many tokens the call has.
            return torch.full((1,), strength)
        window = options.get("context_window")
        if window is not None and window.dim != 2:
            raise ValueError("mask cannot follow context windows over height or width: window the frames, or no mask")
        frames, *size = self._size or x.shape[-3:]
        by_frame = len(identity.mask) > 1
        shortened = window is None and by_frame and frames != x.shape[2]
        # A training has videos of several sizes, and the host says the first alone.
        if not torch.is_grad_enabled() and (shortened or size != [*x.shape[-2:]]):
            raise ValueError(
                "mask cannot follow a conditioning with an area, which shows the model a part of the video: take "
                "Conditioning (Set Mask) with set_cond_area `default` in place of it, or disconnect `mask`"
            )
        sliced = by_frame and getattr(window, "total_frames", 0) > 0
        frames = window.total_frames if sliced else x.shape[2]
        patch = base.diffusion_model.patch_size
        key = ("weights", identity, frames, *x.shape[-2:])
        # On the CPU, where a look at them does not wait for the device.
        weights = self.cache.get(
            base, key, lambda: method.token_weights(identity.mask, frames, *x.shape[-2:], patch[1:])
        )
        if sliced:
            weights = window.get_tensor(weights, weights.device, dim=0, retain_index_list=self._retained)
        if weights.shape[0] != x.shape[2]:
            raise ValueError(
                f"mask covers {weights.shape[0]} latent frames and the model was given {x.shape[2]}: connect a mask "
                "of one frame, or sample without inserted guide frames"
            )
        if strength == 1 and bool((weights == 1).all()):
            return None
        leading, trailing = _other_tokens(base.diffusion_model, x, conditions)
        video = weights.flatten()
        # Tokens that are no place in the video weigh as the video does on average: all or nothing stays so.
        mean = weights.mean().reshape(1)
        return strength * torch.cat([mean.expand(leading), video, mean.expand(trailing)])


def _most_entries(conds: Mapping[str, Sequence[Mapping]], size: tuple[int, int]) -> int:
    """How many times over a reference may be kept: for each height and width that an area has, of a latent of `size`,
    and each version of the weights.
    """
    entries = [cond for group in conds.values() for cond in group or ()]
    sizes = {_area_size(cond.get("area"), size) for cond in entries} or {size}
    hooked = any(cond.get("hooks") is not None for cond in entries)
    return len(sizes) * (method.ReferenceCache.VERSIONS if hooked else 1)


def _area_size(area: Sequence | None, size: tuple[int, int]) -> tuple[int, ...]:
    """Height and width of a host's area: ([frames,] height, width, and where each begins), or parts of the whole."""
    if area is None:
        return size
    if area[0] == "percentage":
        parts = area[1 : 1 + len(area) // 2][-2:]
        return tuple(max(1, round(part * side)) for part, side in zip(parts, size, strict=True))
    return tuple(min(part, side) for part, side in zip(area[: len(area) // 2][-2:], size, strict=True))


def _acts(identity: Identity, base: Any, t: torch.Tensor) -> bool:
    if identity.config.every_step:
        return True
    sampling = base.model_sampling
    start = sampling.percent_to_sigma(identity.config.start_percent) * (1 + _SIGMA_TOLERANCE)
    end = sampling.percent_to_sigma(identity.config.end_percent) * (1 + _SIGMA_TOLERANCE)
    return start >= float(t.max()) > end


def _weights_state(base: Any) -> tuple:
    """What tells today's weights of a model from others that it may hold: its LoRAs and scheduled hooks."""
    hooks = getattr(base.current_patcher, "current_hooks", None)
    scheduled = () if hooks is None else tuple((hook, hook.strength) for hook in hooks.hooks)
    return getattr(base, "current_weight_patches_uuid", None), scheduled


def token_grid(network: Any, x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of tokens in a frame of x [B, C, T, H, W], after the model's padding."""
    if x.ndim != 5:
        raise ValueError(f"the video identity adapter needs a video latent, and this model's is {tuple(x.shape)}")
    return -(-x.shape[-2] // network.patch_size[1]), -(-x.shape[-1] // network.patch_size[2])


def _other_tokens(network: Any, x: torch.Tensor, conditions: Mapping[str, Any]) -> tuple[int, int]:
    """How many tokens the model puts before and after those of the video."""
    height, width = token_grid(network, x)
    leading = trailing = 0
    if network.ref_conv is not None and conditions.get("reference_latent") is not None:
        # Fun Control's start reference: one frame, of its own size.
        size = conditions["reference_latent"].shape[-2:]
        leading = (size[0] // network.patch_size[1]) * (size[1] // network.patch_size[2])
    if conditions.get("time_dim_concat") is not None:  # Phantom
        trailing += conditions["time_dim_concat"].shape[2] * height * width
    for latent in conditions.get("context_latents") or []:
        rows, columns = token_grid(network, latent)
        trailing += latent.shape[2] * rows * columns
    return leading, trailing


def reference_rows(
    base: Any, adapter: method.VideoAdapter, latent: torch.Tensor, keep: frozenset[int], size: tuple[int, int],
    options: Mapping[str, Any], recompute: bool = False,
) -> method.Rows:
    """K and V of references [B, C, 1, h, w] in the model's space, beside a video `size` tokens high and wide.

    `options` are the call's transformer_options, of which scaled rotary positions and the user's attention count.
    `recompute` is gradient checkpointing.
    """
    network = base.diffusion_model
    channels = network.patch_embedding.weight.shape[1]
    if latent.shape[1] < channels:
        # Ours: image-to-video models read a mask and a picture beside the latent; a reference has neither.
        latent = torch.nn.functional.pad(latent, (0, 0, 0, 0, 0, 0, 0, channels - latent.shape[1]))
    latent = comfy.ldm.common_dit.pad_to_patch_size(latent, network.patch_size)
    rows = latent.shape[-2] // network.patch_size[1], latent.shape[-1] // network.patch_size[2]
    rope = options.get("rope_options") or {}
    positions = method.reference_positions(*rows, *_end_of_video(size, rope))
    # The host adds these to the video's positions; what counts is how far the reference is from it.
    positions += torch.tensor([rope.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    rotation = network.rope_embedder(positions.to(latent.device)).movedim(1, 2)
    host = _WanHost(rotation, options.get(blocks.OVERRIDE))
    return method.prefill(network, adapter, latent, base.get_dtype_inference(), keep, host, recompute)


def _end_of_video(size: tuple[int, int], rope: Mapping[str, float]) -> Sequence[float]:
    """H_V and W_V in the positions that the video takes, which a scaled rotary embedding stretches."""
    return [(n - 1) * rope.get(f"scale_{axis}", 1.0) + 1 for n, axis in zip(size, "yx", strict=True)]


class _WanHost:
    """What method.prefill borrows from ComfyUI; the user's own attention, as everywhere."""

    def __init__(self, rotation: torch.Tensor, override: Any):
        self.rotation = rotation
        self.options = {} if override is None else {blocks.OVERRIDE: override}

    def cast(self, parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return comfy.model_management.cast_to(parameter, dtype=like.dtype, device=like.device)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return apply_rope1(x, self.rotation)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = optimized_attention(
            q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2], transformer_options=self.options
        )
        return out.unflatten(-1, q.shape[2:])

    def check(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
