"""Inversion in the host: a picture's path over the sigmas, by the model's own calls, and the noise at its start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.samplers
import latent_preview
import torch

from .. import subject_tokens
from ..patching import samplers
from ..training.objective import prediction_kind
from . import capture, method
from .config import InversionConfig, MaskConfig


@dataclass(frozen=True)
class Inversion:
    """A source latent's path, in the model's space, and where in it the subject is: [B, T, H, W], 0 or 1."""

    trajectory: method.Trajectory
    source_mask: torch.Tensor
    method: str

    @property
    def megabytes(self) -> float:
        return self.trajectory.latents.nbytes / 2**20


def run(
    model: Any, positive: list, latent: dict, sigmas: torch.Tensor, config: InversionConfig, masks: MaskConfig
) -> Inversion:
    """Invert `latent` under `positive` alone, without CFG. Raises ValueError, naming the input and the fix."""
    samples = _checked(latent["samples"], model.model.latent_format)
    grid = [float(sigma) for sigma in sigmas]
    method.check_sigmas(grid)
    prediction_kind(model.get_model_object("model_sampling"), "inversion")
    layers = capture.layers_of(model)
    if layers:
        subject_tokens.require_subject(positive, "positive")
    else:
        logging.warning("[Understudy] this model has no cross-attention: the source mask is the whole picture")
    sampler = Inverting(config, masks, layers)
    guider = comfy.samplers.CFGGuider(capture.watched(model) if layers else model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    callback = latent_preview.prepare_callback(model, len(grid) - 1)
    guider.sample(torch.zeros_like(samples), samples, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)
    return Inversion(method.Trajectory(grid, sampler.path), sampler.mask, config.method)


def _checked(samples: torch.Tensor, latent_format: Any) -> torch.Tensor:
    if samples.is_nested or samples.ndim not in (4, 5) or samples.numel() == 0:
        raise ValueError("latent is no image or video latent: connect VAE Encode to `latent`")
    channels, dimensions = latent_format.latent_channels, latent_format.latent_dimensions
    if samples.shape[1] != channels or samples.ndim != 2 + dimensions:
        wanted = f"[B, {channels}, {'T, ' if dimensions == 3 else ''}H, W]"
        raise ValueError(
            f"latent has shape {tuple(samples.shape)} and the model's latents are {wanted}: encode the picture with "
            "this model's own VAE"
        )
    if not torch.isfinite(samples).all():
        raise ValueError("latent holds NaN or infinite values: encode it again, with the VAE in fp32")
    if not samples.any():
        raise ValueError("latent is all zero, as Empty Latent Image makes it: connect VAE Encode to `latent`")
    return samples


class Inverting(comfy.samplers.Sampler):
    """Runs the sigmas backwards as a SAMPLER, so that the host loads, watches and frees as in every run."""

    def __init__(self, config: InversionConfig, masks: MaskConfig, layers: Sequence[capture.Layer]):
        self.config = config
        self.masks = masks
        self.layers = layers
        self.path: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False):
        grid = [float(sigma) for sigma in sigmas]
        sampling = model_wrap.inner_model.model_sampling
        scales = {sigma: float(samplers.input_scale(sampling, sigmas.new_tensor(sigma))) for sigma in grid}
        entries = subject_tokens.positions_by_entry(model_wrap.conds)
        kept = _storage((len(grid), *latent_image.shape))
        estimate = heat = None
        steps = 0

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            nonlocal estimate, heat
            comfy.model_management.throw_exception_if_processing_interrupted()
            options = extra_args["model_options"]
            watch = capture.Watch(entries, self.layers, self.masks, x.shape) if self.layers else None
            if watch is not None:
                options = {**options, "transformer_options": {**options["transformer_options"], capture.KEY: watch}}
            estimate = model_wrap(
                x.to(latent_image.device), x.new_full((len(x),), sigma, device=latent_image.device),
                model_options=options, seed=extra_args["seed"],
            ).to(kept)
            if watch is not None and (watch.maps or heat is None):  # a cache beside it may have skipped the model
                heat = watch.heat()
            return estimate

        total = None

        def on_step(i: int, x: torch.Tensor) -> None:
            nonlocal total, steps
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"the inversion became NaN or infinite at sigma {grid[i]:.4g}: set method to ddim, give the "
                    "scheduler more steps, or load the model in bf16 or fp32"
                )
            if heat is not None:
                total = heat if total is None else total + heat
            steps += 1
            if callback is not None:
                callback(steps - 1, estimate, x, len(grid) - 1)

        self.path = method.invert(
            denoise, latent_image.to(kept), grid, scales.__getitem__, self.config.method, self.config.iterations,
            on_step,
        )
        if total is None:
            frames = latent_image.shape[2] if latent_image.ndim == 5 else 1
            self.mask = torch.ones(len(latent_image), frames, *latent_image.shape[-2:])
        else:
            self.mask = method.subject_mask(total / steps, latent_image.shape[-2:], self.masks).to(kept.device)
        return latent_image


def _storage(shape: Sequence[int]) -> torch.Tensor:
    """An empty tensor on the device where a path of this shape is kept: where the host keeps what nodes hand on, but
    in main memory where that has no room."""
    device = comfy.model_management.intermediate_device()
    size = 4 * torch.Size(shape).numel()
    if device.type != "cpu" and comfy.model_management.get_free_memory(device) < 4 * size:
        device = torch.device("cpu")
    return torch.empty(0, device=device)


class InvertedNoise:
    """A NOISE that the sampler scales to the path's first latent, whatever latent image comes with it."""

    seed = 0

    def __init__(self, model: Any, inversion: Inversion):
        self.start = inversion.trajectory.latents[0]
        self.sigma = inversion.trajectory.sigmas[0]
        self.sampling = model.get_model_object("model_sampling")
        self.latent_format = model.model.latent_format

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """[B, C, ...], fp32, on the CPU. Raises ValueError where the latent is of another size or batch."""
        samples = input_latent["samples"]
        if samples.is_nested or samples.shape[1:] != self.start.shape[1:] or len(self.start) not in (1, len(samples)):
            raise ValueError(
                f"the noise was inverted for latents {tuple(self.start.shape)} and this one is "
                f"{tuple(samples.shape)}: connect the inverted latent to the sampler"
            )
        image = samples.detach().to("cpu", torch.float32, copy=True)
        if image.any():  # as the host: an empty latent is not shifted
            image = self.latent_format.process_in(image)
        sigma = torch.tensor(self.sigma)
        model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=self.sampling))
        most = comfy.samplers.Sampler().max_denoise(model, [self.sigma])
        # The scaling is affine in the noise: what it makes of 0 and of 1 says how to undo it.
        nothing = self.sampling.noise_scaling(sigma, torch.zeros_like(image), image, most)
        unit = self.sampling.noise_scaling(sigma, torch.ones_like(image), torch.zeros_like(image), most)
        return (self.start.to("cpu", torch.float32) - nothing) / unit
