"""The only calls that wrap a SAMPLER: the guided one is a new object, and the caller's is never changed."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.k_diffusion.sampling import default_noise_sampler

# guide(latent, sigma) -> latent, and what makes one for a run: begin(model, shape) -> guide
Guide = Callable[[torch.Tensor, float], torch.Tensor]
Begin = Callable[[Any, torch.Size], Guide]

# Samplers that call the model once per step, at the grid's sigma, and keep nothing but x from step to step.
# `ddim` is euler with its own noise under a latent mask.
STEPWISE_SAMPLERS = ("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "ddpm", "lcm")


def guide_denoised(sampler: comfy.samplers.Sampler, begin: Begin) -> comfy.samplers.Sampler:
    """A SAMPLER that runs `sampler`, any of ComfyUI's, and guides each denoised estimate it asks for.

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


class _GuidedSampler(comfy.samplers.Sampler):
    def __init__(self, sampler: comfy.samplers.Sampler, begin: Begin):
        self.sampler = sampler
        self.begin = begin

    def max_denoise(self, model_wrap, sigmas):
        return self.sampler.max_denoise(model_wrap, sigmas)

    def _begin(self, guider: Any, shape: torch.Size) -> Guide:
        """The guide of a run; of latents that are packed, video and audio as [B, 1, N], it guides the video."""
        shapes = _packed_shapes(guider)
        if len(shapes) < 2:
            return self.begin(guider.inner_model, shape)
        guide = self.begin(guider.inner_model, torch.Size((shape[0], *shapes[0][1:])))

        def guide_video(latent: torch.Tensor, sigma: float) -> torch.Tensor:
            video, *others = comfy.utils.unpack_latents(latent, shapes)
            guided = guide(video, sigma)
            return latent if guided is video else comfy.utils.pack_latents([guided, *others])[0]

        return guide_video


def _packed_shapes(guider: Any) -> list[torch.Size]:
    """The shapes of the latents that ComfyUI packed into one for this run, or none."""
    entries = (entry for group in getattr(guider, "conds", {}).values() for entry in group or ())
    conditions = (entry.get("model_conds", {}) for entry in entries)
    return next((each["latent_shapes"].cond for each in conditions if "latent_shapes" in each), [])


class _GuidedDenoised(_GuidedSampler):
    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ):
        guided = _GuidedModel(model_wrap, self._begin(model_wrap, noise.shape))
        return self.sampler.sample(
            guided, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
        )


class _GuidedModel:
    """A guider whose every answer is guided; everything else is the guider's.

    Post-CFG functions would miss some: DualModel skips them at CFG 1, and DualCFG calculates on after them.
    """

    def __init__(self, guider: Any, guide: Guide):
        self._guider = guider
        self._guide = guide

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self._guide(self._guider(x, sigma, *args, **kwargs), float(sigma.flatten()[0]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)


class _GuidedLatent(_GuidedSampler):
    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
        disable_pbar=False,
    ):
        model_sampling = model_wrap.inner_model.model_sampling
        guide = self._begin(model_wrap, noise.shape)

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
    """`sampler_function`, one interval of the sigma grid at a time; the same numbers if nothing changes them."""
    takes_noise = "noise_sampler" in inspect.signature(sampler_function).parameters

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        if takes_noise:
            # One stream of noise for the whole run: a sampler seeds its own anew in every call.
            options.setdefault("noise_sampler", default_noise_sampler(x, seed=(extra_args or {}).get("seed")))
        for i in comfy.utils.model_trange(len(sigmas) - 1, disable=disable):
            numbered = None if callback is None else (lambda state, i=i: callback({**state, "i": i}))
            # A copy, since CFG++ samplers add another function to extra_args in every call.
            x = sampler_function(
                model, x, sigmas[i : i + 2], extra_args=dict(extra_args or {}), callback=numbered, disable=True,
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
    """What KSamplerSelect calls it, as far as that can be told."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")
