"""Video identity inside a sampling run: what ComfyUI calls, and when a reference is computed.

Before each call of the model the references' keys and values are looked up, or computed once and cached until the run
ends. They travel in `transformer_options` to the blocks, whose first attention, the self-attention, then sees them.
Nothing of the model is replaced: its own blocks run with an attention function around the user's.
"""

import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.ldm.wan.model import HumoWanModel, SCAILWanModel
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...kernels.restricted_attention import Reference
from .. import explanations
from ..inputs import latents
from ..inputs.families import family, identity_instead
from ..messages import tell
from ..patching import models, wan_blocks
from . import blocks, explaining, method, reference_pass
from .blocks import KEY
from .guidance import LEFT_OUT, ReferenceGuidance
from .method import VideoReference
from .reference_pass import ReferenceKV, token_grid

# Channels of VACE's context that hold what stays; after them come what changes, and where.
_VACE_UNCHANGED = 16
# Tested with tiny weights; others are refused. WanModel_S2V marks each kind of token, and WanDancerModel embeds a
# video at another frame rate with other weights, of which a reference would know nothing.
VERIFIED = (
    "WanModel", "VaceWanModel", "CameraWanModel", "HumoWanModel", "AnimateWanModel", "SCAILWanModel",
    "SCAIL2WanModel",
)


class ReferenceCache:
    """What was computed for a loaded model and a reference; an entry is complete or absent.

    Thread-safe: one thread computes while the others wait.
    """

    # Weights that change with the step make a version each: the two halves of CFG may have different ones.
    VERSIONS = 2
    RUN_STATE = ("_lock", "_entries")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[tuple, tuple[weakref.ref, dict[tuple, Any]]] = {}

    def get(self, owner: Any, key: tuple, compute: Callable[[], Any], version: tuple = ()) -> Any:
        """The value of (owner, key) in this version, computed where there is none.

        What `compute` raises leaves no entry. The newest VERSIONS of a key stay.
        """
        with self._lock:
            entry = self._entries.get((id(owner), *key))
            # An id alone could be that of a model that no longer exists.
            versions = entry[1] if entry is not None and entry[0]() is owner else {}
            if version not in versions:
                value = compute()
                while len(versions) >= self.VERSIONS:
                    del versions[next(iter(versions))]
                versions[version] = value
                self._entries[(id(owner), *key)] = (weakref.ref(owner), versions)
            return versions[version]

    def clear(self) -> None:
        """Drop every entry."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def apply(model: Any, reference: VideoReference) -> Any:
    """A clone of MODEL `model` that sees the reference, after those that it sees already; `model` if it is off.

    Raises ValueError, naming the input and the fix, where model, adapter, reference and blocks do not fit together.
    """
    network = wan_network(model)
    reference.adapter.check(network.dim, len(network.blocks))
    method.selected_blocks(reference.config, len(network.blocks))
    latents.check_channels(reference.latent, "reference", model.model.latent_format.latent_channels)
    if reference.off:
        if reference.config.strength:
            # Load Image gives such a mask for a picture without alpha, and the video does not show the reason.
            warning = "the mask is 0 everywhere, so the video shows no reference: connect one of where the person is"
            tell("Apply Video Identity", [warning], logging.WARNING)
        return model
    earlier = models.attachment(model, KEY)
    run = SamplingReferences((*(earlier.references if earlier else ()), reference))
    patched = models.with_wrappers(
        model, key=KEY, attachment=run, callbacks={CallbacksMP.ON_CLEANUP: run.cleanup},
        wrappers={
            WrappersMP.OUTER_SAMPLE: run.outer_sample, WrappersMP.APPLY_MODEL: run.apply_model,
            WrappersMP.PREPARE_SAMPLING: run.prepare_sampling,
        },
    )
    if not run.guidance.off:
        patched = models.with_post_cfg(patched, function=run.guidance)
    return with_block_patches(patched)


def with_block_patches(model: Any) -> Any:
    """A clone of a Wan MODEL whose blocks see the references that a call's transformer_options hold under KEY."""
    network = model.get_model_object("diffusion_model")
    return models.with_block_patches(model, key=KEY, patches=blocks.ReferenceBlockPatch.for_every_block(network))


def wan_network(model: Any) -> Any:
    """The Wan transformer of a MODEL. Raises ValueError for any model whose attention cannot be extended."""
    network = model.get_model_object("diffusion_model")
    name = type(network).__name__
    kind = f"{family(model)}, a {name}"
    if not wan_blocks.is_wan(network):
        raise ValueError(
            f"model is {kind}, and the video identity adapter needs a Wan video model: connect one, or "
            f"{identity_instead(model)}"
        )
    advice = "connect a Wan T2V, I2V, VACE, camera, Animate, HuMo or SCAIL model"
    if not wan_blocks.runs_patches(network):
        raise ValueError(f"model is {kind}, which does not let its attention be extended: {advice}")
    if name not in VERIFIED:
        raise ValueError(
            f"model is {kind}, a relative of Wan in which the video identity adapter is not verified: {advice}"
        )
    return network


class SamplingReferences:
    """The references of one patched model, in the order of its nodes, and what is computed for them in a run."""

    RUN_STATE = ("cache", "_size", "_retained", "_expected", "_reached", "_shares", "explained")

    def __init__(self, references: tuple[VideoReference, ...]):
        self.references = references
        self.cache = ReferenceCache()
        self.guidance = ReferenceGuidance(references)
        self.explained = explanations.Runs()  # the shares of runs that Explain Result asks for
        self._shares: explaining.Shares | None = None
        self._begin()

    def _begin(self) -> None:
        self._size: tuple[int, ...] | None = None  # frames, height and width of the latents of this run
        self._leading = 0  # latent frames before the video, for a picture beside it
        self._retained: list[int] = []  # frames of the video that context windows leave at their places
        self._expected: set[int] = set()  # blocks that were handed references in this run
        self._reached: set[int] = set()  # those that met them

    def explain(self, samples: torch.Tensor) -> explanations.Explanation:
        """Where the run that made `samples` attended to the references. Raises ValueError, naming the fix."""
        return explaining.of_video(self.explained.of(samples))

    def outer_sample(self, executor, *args, **kwargs):
        """ComfyUI's OUTER_SAMPLE: remember what was recorded under the samples that the run made."""
        self._shares = shares = explaining.Shares() if explanations.is_asked() else None
        try:
            samples = executor(*args, **kwargs)
        finally:
            self._shares = None
        if shares is not None and not samples.is_nested:
            self.explained.add(samples, shares)
        return samples

    def cleanup(self, _patcher: Any) -> None:
        """ComfyUI's ON_CLEANUP: nothing outlives a run."""
        if missing := sorted(self._expected - self._reached):
            warning = (
                f"the reference did not act in blocks {missing}: either a node after it replaces them, then put "
                "Apply Video Identity after that node; or a cache such as EasyCache skipped "
                "every step in which it acts"
            )
            tell("Apply Video Identity", [warning], logging.WARNING)
        self.cache.clear()
        self.guidance.begin()
        self._begin()

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """ComfyUI's PREPARE_SAMPLING: the memory estimate grows by the cache, as columns of the latent."""
        shape = list(noise_shape)
        self._retained = getattr(model.model_options.get("context_handler"), "latent_retain_index_list", [])
        if len(shape) == 5:
            self._size = tuple(shape[-3:])
            tell("Apply Video Identity", method.doubts(self.references, shape), logging.WARNING)
            # The width, since context windows overwrite the frames; of the whole batch, which shares one cache.
            column = model.model.memory_required([*shape[:-1], 1])
            entries = _most_entries(conds, tuple(noise_shape[-2:]))
            shape[-1] += math.ceil(self.cache_bytes(model.model) * entries / column)
        return executor(model, shape, conds, *args, **kwargs)

    def cache_bytes(self, base: Any) -> int:
        """Bytes of the keys and values of every reference, beside videos of one size."""
        network = base.diffusion_model
        total = 0
        for reference in self.references:
            patches = zip(reference.latent.shape[2:], network.patch_size, strict=True)
            tokens = math.prod(-(-n // p) for n, p in patches)
            count = len(method.selected_blocks(reference.config, len(network.blocks)))
            total += 2 * count * tokens * network.dim * base.get_dtype_inference().itemsize
        return total

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """ComfyUI's APPLY_MODEL: hand each block its references; a call in which none is active is unchanged."""
        base = executor.class_obj
        left_out = transformer_options.get(LEFT_OUT)
        active = {
            i: reference for i, reference in enumerate(self.references)
            if i != left_out and method.is_active(reference, base.model_sampling, t)
        }
        numbered = self._by_block(base, active, x, transformer_options, kwargs) if active else {}
        by_block = {i: tuple(of_block.values()) for i, of_block in numbered.items()}
        reached = blocks.ReachedBlocks()
        if by_block:
            transformer_options = {**transformer_options, KEY: by_block, blocks.REACHED: reached}
            if self._shares is not None and left_out is None:
                recorder = self._recorder(base, x, t, transformer_options, kwargs, numbered)
                transformer_options[blocks.RECORDER] = recorder
        result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        self._expected.update(by_block)
        self._reached.update(reached.numbers)
        return result

    def _recorder(self, base, x, t, options, conditions, numbered) -> explaining.CallRecorder | None:
        """What records this call for Explain Result."""
        grid = x.shape[2], *token_grid(base.diffusion_model, x)
        leading, _ = _other_tokens(base.diffusion_model, x, conditions)
        total = self._size[0] if self._size else x.shape[2]
        numbers = {i: list(of_block) for i, of_block in numbered.items()}
        return explaining.call_recorder(
            self._shares, float(t.max()), options, grid, leading, len(x), total, numbers
        )

    def _by_block(self, base, references, x, options, conditions) -> dict[int, dict[int, Reference]]:
        """Each block's references for this call by number, without those that weigh 0 everywhere in it."""
        by_block: dict[int, dict[int, Reference]] = {}
        for number, reference in references.items():
            weight = self._weight(base, reference, x, options, conditions)
            if weight is not None:
                if not weight.any():
                    continue
                weight = weight.to(x.device)
            for i, (k, v) in self._kv(base, reference, x, options).items():
                by_block.setdefault(i, {})[number] = Reference(k, v, weight)
        return by_block

    def _kv(self, base, reference, x, options) -> ReferenceKV:
        """Keys and values of a reference beside a video of this size, from the cache or computed now."""
        network = base.diffusion_model
        video_size = token_grid(network, x)
        selected = method.selected_blocks(reference.config, len(network.blocks))

        def compute() -> ReferenceKV:
            # Copied, since a latent format may work in place.
            latent = base.process_latent_in(reference.latent.clone()).to(x.device)
            # As where ComfyUI computes its own blocks twice, a backward pass keeps little of it.
            recompute = torch.is_grad_enabled()
            return reference_pass.reference_kv(
                base, reference.adapter, latent, blocks=selected, video_size=video_size, options=options,
                recompute=recompute,
            )

        if torch.is_grad_enabled():  # a training runs through this model: weights and graph belong to the step
            return compute()
        rope = tuple(sorted((options.get("rope_options") or {}).items()))
        key = (
            "kv", reference.digest, reference.adapter, reference.config.blocks, video_size,
            base.get_dtype_inference(), x.device, rope,
        )
        return self.cache.get(base, key, compute, _weights_version(base))

    def _weight(self, base, reference, x, options, conditions) -> torch.Tensor | None:
        """The weight of each token of this call, [N], of all of them alike, [1], or None for the published 1."""
        strength = reference.config.strength
        if reference.mask is None:
            return None if strength == 1 else torch.full((1,), strength)
        video = self._mask_weights(base, reference, x, options, conditions)
        if strength == 1 and bool((video == 1).all()):
            return None
        leading, trailing = _other_tokens(base.diffusion_model, x, conditions)
        # Tokens outside the video get its mean weight, so that all 0 and all 1 stay exact.
        mean = video.mean().reshape(1)
        return strength * torch.cat([mean.expand(leading), video.flatten(), mean.expand(trailing)])

    def _mask_weights(self, base, reference, x, options, conditions) -> torch.Tensor:
        """The mask's weight of each token of the video in this call, [frames, rows, columns], on the CPU."""
        window = options.get("context_window")
        if window is not None and window.dim != 2:
            raise ValueError(
                "mask cannot follow context windows over height or width: window the frames, or disconnect `mask`"
            )
        frames, *size = self._size or x.shape[-3:]
        by_frame = len(reference.mask) > 1
        shortened = window is None and by_frame and frames != x.shape[2]
        # A training has videos of several sizes, of which ComfyUI tells the first alone.
        if not torch.is_grad_enabled() and (shortened or size != [*x.shape[-2:]]):
            raise ValueError(
                "mask cannot follow a conditioning with an area, which shows the model a part of the video: take "
                "Conditioning (Set Mask) with set_cond_area `default` instead, or disconnect `mask`"
            )
        sliced = by_frame and getattr(window, "total_frames", 0) > 0
        frames = window.total_frames if sliced else x.shape[2]
        patch = base.diffusion_model.patch_size
        if window is None or 0 in getattr(window, "index_list", ()):  # later windows do not show it
            self._leading = self.cache.get(
                base, ("leading", frames), lambda: _leading_frames(base.diffusion_model, conditions)
            )
        key = ("weights", reference, frames, self._leading, *x.shape[-2:])
        # On the CPU, where reading them does not wait for the device.
        weights = self.cache.get(
            base, key, lambda: method.token_weights(reference.mask, frames, *x.shape[-2:], patch[1:], self._leading)
        )
        if sliced:
            weights = window.get_tensor(weights, weights.device, dim=0, retain_index_list=self._retained)
        if weights.shape[0] != x.shape[2]:
            raise ValueError(
                f"mask covers {weights.shape[0]} latent frames and the model received {x.shape[2]}: connect a mask "
                "of one frame, or sample without inserted guide frames"
            )
        return weights


def _leading_frames(network: Any, conditions: Mapping[str, Any]) -> int:
    """How many latent frames before the video's are a picture of the model's: Animate's first one always, and VACE's
    where what changes, and where, are 0.
    """
    if type(network).__name__ == "AnimateWanModel":
        return 1
    context = conditions.get("vace_context")
    if context is None:
        return 0
    used = context[:, :, _VACE_UNCHANGED:].abs().amax(dim=(0, 1, 2, 4, 5)) > 1e-3  # rounded
    return int(used.float().argmax())


def _most_entries(conds: Mapping[str, Sequence[Mapping]], size: tuple[int, int]) -> int:
    """How many cache entries a reference may have: one for each height and width of an area in a latent of `size`,
    and each version of the weights.
    """
    entries = [cond for group in conds.values() for cond in group or ()]
    sizes = {_area_size(cond.get("area"), size) for cond in entries} or {size}
    hooked = any(cond.get("hooks") is not None for cond in entries)
    return len(sizes) * (ReferenceCache.VERSIONS if hooked else 1)


def _area_size(area: Sequence | None, size: tuple[int, int]) -> tuple[int, ...]:
    """Height and width of an area of ComfyUI: ([frames,] height, width, their starts), or fractions of `size`."""
    if area is None:
        return size
    if area[0] == "percentage":
        parts = area[1 : 1 + len(area) // 2][-2:]
        return tuple(max(1, round(part * side)) for part, side in zip(parts, size, strict=True))
    return tuple(min(part, side) for part, side in zip(area[: len(area) // 2][-2:], size, strict=True))


def _weights_version(base: Any) -> tuple:
    """What tells the model's present weights from others that it may have in a run: LoRAs and scheduled hooks."""
    hooks = getattr(base.current_patcher, "current_hooks", None)
    scheduled = () if hooks is None else tuple((hook, hook.strength) for hook in hooks.hooks)
    return getattr(base, "current_weight_patches_uuid", None), scheduled


def _other_tokens(network: Any, x: torch.Tensor, conditions: Mapping[str, Any]) -> tuple[int, int]:
    """How many tokens the model adds before and after those of the video."""
    height, width = token_grid(network, x)
    leading = trailing = 0
    reference = conditions.get("reference_latent")
    if reference is not None and network.ref_conv is not None:
        # Fun Control's start reference: one frame, of any size.
        size = reference.shape[-2:]
        leading = (size[0] // network.patch_size[1]) * (size[1] // network.patch_size[2])
    elif reference is not None and isinstance(network, SCAILWanModel):
        leading = _tokens(network, reference)
    elif reference is not None and isinstance(network, HumoWanModel):
        trailing = _tokens(network, reference)
    if isinstance(network, SCAILWanModel) and conditions.get("pose_latents") is not None:
        trailing += _tokens(network, conditions["pose_latents"])
    if conditions.get("time_dim_concat") is not None:  # Phantom
        trailing += conditions["time_dim_concat"].shape[2] * height * width
    for latent in conditions.get("context_latents") or []:
        trailing += _tokens(network, latent)
    return leading, trailing


def _tokens(network: Any, latent: torch.Tensor) -> int:
    return latent.shape[2] * math.prod(token_grid(network, latent))
