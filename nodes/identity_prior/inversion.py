"""Inversion: a picture's path from noise, and where its subject is; apart from sampling.py, which runs on its result.

The path comes from the model's own calls, in a sampling run for which ComfyUI loads and frees as for any other.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch

from .. import subject_tokens
from ..inputs import latents, strangers
from ..inputs.families import check_one_latent, family
from ..inputs.model_fit import check_latents, check_texts
from ..messages import tell
from ..patching import models, samplers
from ..patching.unet_layers import CrossAttention
from ..training.objective import prediction_kind
from . import attention, method
from .config import FLOW_EDIT, InversionConfig, MaskConfig


@dataclass(frozen=True)
class Inversion:
    """A source latent's path, in the model's space, and where in it the subject is: [B, T, H, W], 0 or 1.

    `weights` is ComfyUI's id of the model's weights with their LoRAs, None where it is not known.
    """

    trajectory: method.Trajectory
    source_mask: torch.Tensor
    method: str
    weights: uuid.UUID | None = None

    @property
    def megabytes(self) -> float:
        return self.trajectory.latents.nbytes / 2**20


def invert(
    model: Any, positive: list, latent: dict, sigmas: torch.Tensor, config: InversionConfig, masks: MaskConfig,
    mask_text: list | None = None,
) -> Inversion:
    """Invert `latent` under `positive` alone, without CFG. Raises ValueError, naming the input and the fix.

    The subject is looked for by `positive`, or by `mask_text` in one more call a step.
    """
    check_one_latent(model, "inversion")
    samples = _checked(latent["samples"], model)
    method.check_sigmas([float(sigma) for sigma in sigmas])
    prediction_kind(model.get_model_object("model_sampling"), "inversion", family(model))
    check_texts([positive], "positive", model, "use the CLIP of this model in Encode Identity")
    # They skip calls by what changed since a higher sigma, and an inversion comes from lower ones.
    model, cache = models.without_step_caches(model)
    if cache:
        tell("Invert Image", [f"{cache} is left out of the inversion, which needs every call of the model"])
    tell("Invert Image", strangers.warnings(samples, "latent", model.model.model_config), logging.WARNING)
    layers = attention.layers_of(model)
    looked_at, name = (positive, "positive") if mask_text is None else (mask_text, "mask_text")
    if attention.need_no_subject(layers) and not (layers and subject_tokens.tagged_positions(looked_at)):
        reason = f"{name} does not say where the subject is named" if layers else (
            f"{family(model)} has no cross-attention that can be read"
        )
        layers = ()
        tell("Invert Image", [f"{reason}, so the source mask is the whole picture"], logging.WARNING)
    else:
        subject_tokens.require_subject(looked_at, name)
        if mask_text is not None:
            check_texts([mask_text], name, model, "use the CLIP of this model in Encode Identity")
    sampler = InversionSampler(config, masks, layers)
    guider = comfy.samplers.CFGGuider(attention.with_recorder(model) if layers else model)
    guider.set_conds(positive, positive)
    if layers and mask_text is not None:
        guider.original_conds |= {attention.KEY: comfy.sampler_helpers.convert_cond(mask_text)}
    guider.set_cfg(1.0)
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)
    return replace(sampler.inversion, weights=model.patches_uuid)


def _checked(samples: torch.Tensor, model: Any) -> torch.Tensor:
    latents.check_latent(samples, "latent")
    check_latents([samples], "latent", model)
    latents.check_not_zero(samples, "latent")
    return samples


@dataclass(eq=False)
class InversionSampler(comfy.samplers.Sampler):
    """Inversion as a SAMPLER, which is how ComfyUI loads, patches, watches and frees a model for a run.

    `inversion` is what its run found; the run's samples are the picture itself.
    """

    config: InversionConfig
    masks: MaskConfig
    layers: Sequence[CrossAttention]
    inversion: Inversion = field(init=False)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        grid = [float(sigma) for sigma in sigmas]
        model_sampling = model_wrap.inner_model.model_sampling
        scales = {sigma: float(samplers.input_scale(model_sampling, sigmas.new_tensor(sigma))) for sigma in grid}
        clean = latent_image.to(_path_device((len(grid), *latent_image.shape)), torch.float32)
        steps = _Steps(model_wrap, extra_args, latent_image.device, self.layers, self.masks, grid, callback)
        if self.config.path == FLOW_EDIT:
            new = torch.randn(clean.shape, generator=torch.Generator().manual_seed(self.config.seed)).to(clean)

            def noised(sigma: float) -> torch.Tensor:
                return model_sampling.noise_scaling(clean.new_tensor(sigma), new.clone(), clean, False)

            path = method.straight_path(steps.denoise, grid, noised, clean, steps.finish_step)
        else:
            path = method.invert(
                steps.denoise, clean, grid, scales.__getitem__, self.config.method, self.config.iterations,
                steps.finish_step,
            ),
        name = FLOW_EDIT if self.config.path == FLOW_EDIT else self.config.method
        self.inversion = Inversion(method.Trajectory(grid, *path), steps.source_mask(clean), name)
        return latent_image


@dataclass(eq=False)
class _Steps:
    """The model's calls in one inversion, and the subject's map, [B, T, h, w], summed over the steps."""

    guider: Any
    extra_args: Mapping[str, Any]
    device: torch.device
    layers: Sequence[CrossAttention]
    masks: MaskConfig
    sigmas: Sequence[float]
    callback: Callable | None
    denoised: torch.Tensor | None = None
    heat: torch.Tensor | None = None
    heat_sum: torch.Tensor | float = 0.0
    done: int = 0

    def __post_init__(self) -> None:
        looked_at = self.guider.conds.get(attention.KEY)
        self.by_mask_text = looked_at is not None
        conditions = {attention.KEY: looked_at} if self.by_mask_text else self.guider.conds
        self.subject = subject_tokens.positions_by_entry(conditions)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The guider's estimate of x [B, C, ...] at sigma, where x is stored."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        options = self.extra_args["model_options"]
        recorder = None
        if self.layers and not self.by_mask_text:
            recorder = attention.AttentionRecorder(self.subject, self.layers, self.masks, x.shape)
            options = recorder.added_to(options)
        self.denoised = self.guider(
            *self._on_device(x, sigma), model_options=options, seed=self.extra_args["seed"]
        ).to(x)
        if recorder is not None:
            self.heat = recorder.heat(self.heat)
        return self.denoised

    def finish_step(self, i: int, x: torch.Tensor) -> None:
        """After x, with which step i of the sampler begins, is known. Raises ValueError for NaN."""
        if not torch.isfinite(x).all():
            raise ValueError(
                f"the inversion became NaN or infinite at sigma {self.sigmas[i]:.4g}: set method to ddim, give the "
                "scheduler more steps, or load the model in bf16 or fp32"
            )
        if self.by_mask_text:
            recorder = attention.AttentionRecorder(self.subject, self.layers, self.masks, x.shape)
            options = self.extra_args["model_options"]
            attention.look_by_mask_text(self.guider, *self._on_device(x, self.sigmas[i]), options, recorder)
            self.heat = recorder.heat(self.heat)
        if self.heat is not None:
            self.heat_sum = self.heat_sum + self.heat
        self.done += 1
        if self.callback is not None:
            self.callback(self.done - 1, self.denoised, x, len(self.sigmas) - 1)

    def _on_device(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(self.device), x.new_full((len(x),), sigma, device=self.device)

    def source_mask(self, clean: torch.Tensor) -> torch.Tensor:
        """[B, T, H, W] of the source latent `clean`, stored beside it; all of it where nothing shows the subject."""
        if not self.layers:
            return torch.ones(len(clean), clean.shape[2] if clean.ndim == 5 else 1, *clean.shape[-2:])
        mean = self.heat_sum / (len(self.sigmas) - 1)
        mask = method.subject_mask(mean, clean.shape[-2:], self.masks)
        if doubt := method.doubt(mean, mask):
            tell("Invert Image", [f"the source mask {doubt}: {attention.MASK_FIX}"], logging.WARNING)
        return mask.to(clean.device)


def _path_device(shape: Sequence[int]) -> torch.device:
    """Where a path of this shape, in fp32, is stored: where ComfyUI keeps what nodes hand on, or in main memory where
    that has no room.
    """
    device = comfy.model_management.intermediate_device()
    size = 4 * torch.Size(shape).numel()
    if device.type != "cpu" and comfy.model_management.get_free_memory(device) < 4 * size:
        return torch.device("cpu")
    return device


class InvertedNoise:
    """A NOISE that the sampler scales to the path's first latent, whatever latent image comes with it."""

    seed = 0

    def __init__(self, model: Any, inversion: Inversion):
        self.start = inversion.trajectory.latents[0]
        self.sigma = inversion.trajectory.sigmas[0]
        self.model_sampling = model.get_model_object("model_sampling")
        self.latent_format = model.model.latent_format

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """[B, C, ...], fp32, on the CPU. Raises ValueError where the latent is of another size or batch."""
        samples = input_latent["samples"]
        if samples.is_nested or samples.shape[1:] != self.start.shape[1:] or len(self.start) not in (1, len(samples)):
            raise ValueError(
                f"the noise was inverted for latents of shape {tuple(self.start.shape)}, and the sampler's has shape "
                f"{tuple(samples.shape)}: connect the inverted latent to the sampler"
            )
        image = samples.detach().to("cpu", torch.float32, copy=True)
        if image.any():  # as ComfyUI does: an empty latent is not shifted
            image = self.latent_format.process_in(image)
        sigma = torch.tensor(self.sigma)
        model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=self.model_sampling))
        max_denoise = comfy.samplers.Sampler().max_denoise(model, [self.sigma])
        # The scaling is affine in the noise: what it makes of 0 and of 1 says how to undo it.
        scaling = self.model_sampling.noise_scaling
        at_zero = scaling(sigma, torch.zeros_like(image), image, max_denoise)
        factor = scaling(sigma, torch.ones_like(image), torch.zeros_like(image), max_denoise)
        return (self.start.to("cpu", torch.float32) - at_zero) / factor
