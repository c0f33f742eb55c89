"""The only calls that patch a MODEL or wrap a SAMPLER: clone, then replace, and never change the caller's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.k_diffusion.sampling import default_noise_sampler

# guide(latent, sigma) -> latent, and what makes one for a run: begin(model, shape) -> guide
Guide = Callable[[torch.Tensor, float], torch.Tensor]
Begin = Callable[[Any, torch.Size], Guide]

# Samplers that call the model once a step, at the grid's sigma, and keep nothing but x from step to step.
# `ddim` is euler with its own noise under a latent mask.
STEPWISE_SAMPLERS = ("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "ddpm", "lcm")


def with_compute_dtype(model: comfy.model_patcher.ModelPatcher, dtype: torch.dtype):
    """A clone of `model` that computes in `dtype`, its weights stored as they are."""
    patcher = model.clone()
    patcher.set_model_compute_dtype(dtype)
    return patcher


def with_sampling_parts(
    model: comfy.model_patcher.ModelPatcher,
    key: str,
    wrappers: Mapping[str, Callable],
    callbacks: Mapping[str, Callable],
    attachment: Any,
    blocks: Mapping[int, Callable[[Any], Callable]],
    cross_attention: Mapping[tuple[str, int, int], Callable[[Any], Callable]] | None = None,
    cross_attention_inputs: Callable | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` with these parts under `key`, in place of those that it had there.

    wrappers and callbacks go by the host's kinds; `attachment` is what `parts(model, key)` finds again.
    blocks[i](earlier) makes what stands for transformer block i; `earlier` is the patch there before, or None,
    and is called by the new one. cross_attention does the same for a UNet: (part, block, transformer) as in
    ("input", 4, 0). `cross_attention_inputs` is called by a UNet's layers with their inputs, before those that are
    there, which change keys and values each in their own way. A patch that is `key`'s own already, by its attribute
    `key`, stays.
    """
    patcher = model.clone()
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, key)
        patcher.add_wrapper_with_key(kind, key, wrapper)
    for kind, callback in callbacks.items():
        patcher.remove_callbacks_with_key(kind, key)
        patcher.add_callback_with_key(kind, key, callback)
    patcher.set_attachments(key, attachment)
    replaced = patcher.model_options["transformer_options"].get("patches_replace", {})
    for index, make in blocks.items():
        earlier = replaced.get("dit", {}).get(("double_block", index))
        if getattr(earlier, "key", None) != key:
            patcher.set_model_patch_replace(make(earlier), "dit", "double_block", index)
    for place, make in (cross_attention or {}).items():
        there = replaced.get("attn2", {})
        # The host falls back to a patch of the whole block where a transformer has none of its own.
        earlier = there.get(place, there.get(place[:2]))
        if getattr(earlier, "key", None) != key:
            patcher.set_model_patch_replace(make(earlier), "attn2", *place)
    present = patcher.model_options["transformer_options"].get("patches", {}).get("attn2_patch", [])
    if cross_attention_inputs is not None and all(getattr(patch, "key", None) != key for patch in present):
        patcher.model_options["transformer_options"].setdefault("patches", {})["attn2_patch"] = [
            cross_attention_inputs, *present
        ]
    return patcher


def with_lora(
    model: comfy.model_patcher.ModelPatcher, weights: Mapping[str, torch.Tensor], strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` with a LoRA on top, as Load LoRA gives it."""
    return comfy.sd.load_lora_for_models(model, None, dict(weights), strength, 0.0)[0]


def with_weights(
    model: comfy.model_patcher.ModelPatcher, weights: Mapping[str, torch.Tensor], strength: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that samples with these weights in place of its own, by full name; `strength` is how far the
    way from its own is gone, and at 1 they are met to the bit.
    """
    patcher = model.clone()
    if strength == 1:
        patcher.add_patches({key: ("set", (weight,)) for key, weight in weights.items()})
    else:
        patcher.add_patches({key: ("diff", (weight,)) for key, weight in weights.items()}, strength, 1 - strength)
    return patcher


def with_unet_patches(
    model: comfy.model_patcher.ModelPatcher, patches: Mapping[str, Callable]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` with these patches by the host's names, such as emb_patch, after those that are there.

    One whose attribute `key` stands there already is not added again.
    """
    patcher = model.clone()
    for name, patch in patches.items():
        present = patcher.model_options["transformer_options"].get("patches", {}).get(name, [])
        if all(getattr(other, "key", None) != patch.key for other in present):
            patcher.set_model_patch(patch, name)
    return patcher


def parts(model: comfy.model_patcher.ModelPatcher, key: str) -> Any:
    """What `with_sampling_parts` attached under `key`, or None."""
    return model.get_attachment(key)


def guide_denoised(sampler: comfy.samplers.Sampler, begin: Begin) -> comfy.samplers.Sampler:
    """A SAMPLER that runs `sampler`, any of the host's, and guides each denoised estimate it asks for.

    The guide sees the guider's answer, after CFG and all that belongs to it, in the model's latent space, before
    a latent mask is applied, and the sigma of that evaluation, on the sampler's grid or off it.
    """
    return _GuidedDenoised(sampler, begin)


def guide_latent(sampler: comfy.samplers.Sampler, begin: Begin) -> comfy.samplers.Sampler:
    """A SAMPLER that runs `sampler` and guides the latent itself after every step that ends above sigma 0.

    The guide sees the latent at the scale of the model's input, as in the variance-preserving publication,
    and the sigma that the step arrived at. Regions that a latent mask keeps are left alone.
    Raises ValueError, naming the samplers that work, for one that is not in STEPWISE_SAMPLERS.
    """
    advice = f"choose ddim, {', '.join(STEPWISE_SAMPLERS)}, or set apply_to to denoised, which works with all"
    name = sampler_name(sampler)
    if not isinstance(sampler, comfy.samplers.KSAMPLER) or name not in STEPWISE_SAMPLERS:
        raise ValueError(f"the latent of sampler {name} cannot be guided between its steps: {advice}")
    options = sampler.extra_options
    # These two spread over the number of steps, so that a run cannot be taken apart.
    ramp = options.get("s_noise_end") not in (None, options.get("s_noise", 1.0))
    if ramp or options.get("s_churn", 0) != 0:
        raise ValueError(
            f"the latent of sampler {name} cannot be guided while s_churn is set or s_noise_end differs from "
            f"s_noise: reset them, {advice}"
        )
    return _GuidedLatent(sampler, begin)


class _GuidedDenoised(comfy.samplers.Sampler):
    def __init__(self, sampler: comfy.samplers.Sampler, begin: Begin):
        self.sampler = sampler
        self.begin = begin

    def max_denoise(self, model_wrap, sigmas):
        return self.sampler.max_denoise(model_wrap, sigmas)

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        return self.sampler.sample(
            _Guided(model_wrap, self.begin(model_wrap.inner_model, noise.shape)),
            sigmas,
            extra_args,
            callback,
            noise,
            latent_image,
            denoise_mask,
            disable_pbar,
        )


class _Guided:
    """A guider whose every answer is guided; everything else is the guider's own.

    Post-CFG functions would miss some: DualModel skips them at CFG 1, DualCFG goes on calculating after them.
    """

    def __init__(self, guider: Any, guide: Guide):
        self._guider = guider
        self._guide = guide

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self._guide(self._guider(x, sigma, *args, **kwargs), float(sigma.flatten()[0]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)


class _GuidedLatent(comfy.samplers.Sampler):
    def __init__(self, sampler: comfy.samplers.KSAMPLER, begin: Begin):
        self.sampler = sampler
        self.begin = begin

    def max_denoise(self, model_wrap, sigmas):
        return self.sampler.max_denoise(model_wrap, sigmas)

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        model_sampling = model_wrap.inner_model.model_sampling
        guide = self.begin(model_wrap.inner_model, noise.shape)

        def between_steps(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            scale = input_scale(model_sampling, sigma)
            z = x * scale
            guided = guide(z, float(sigma))
            if guided is z:
                return x
            step = (guided - z) / scale
            return x + (step if denoise_mask is None else step * denoise_mask)

        stepwise = copy.copy(self.sampler)
        stepwise.sampler_function = _step_by_step(self.sampler.sampler_function, between_steps)
        return stepwise.sample(
            model_wrap, sigmas, dict(extra_args), callback, noise, latent_image, denoise_mask, disable_pbar
        )


def _step_by_step(sampler_function: Callable, between_steps: Callable) -> Callable:
    """`sampler_function`, one interval of the sigma grid at a time; the same numbers if nothing changes."""
    takes_noise = "noise_sampler" in inspect.signature(sampler_function).parameters

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if takes_noise:
            # One stream of noise for the whole run: a sampler seeds its own anew in every call.
            options.setdefault("noise_sampler", default_noise_sampler(x, seed=(extra_args or {}).get("seed")))
        for i in comfy.utils.model_trange(len(sigmas) - 1, disable=disable):
            numbered = None if callback is None else (lambda state, i=i: callback({**state, "i": i}))
            # A copy, since CFG++ samplers add a function of their own to extra_args in every call.
            x = sampler_function(
                model,
                x,
                sigmas[i : i + 2],
                extra_args=dict(extra_args or {}),
                callback=numbered,
                disable=True,
                **options,
            )
            if sigmas[i + 1] > 0:
                x = between_steps(x, sigmas[i + 1])
        return x

    sample.__name__ = sampler_function.__name__
    return sample


def input_scale(model_sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """The factor from the sampler's x to the model's input at sigma, 1 at sigma 0; no dimensions."""
    one = torch.ones((), device=sigma.device)
    at_zero = model_sampling.calculate_input(torch.zeros_like(sigma), one)
    return model_sampling.calculate_input(sigma, one) / at_zero


def sampler_name(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")
