"""Pictures that a model draws for its own training: previews, and pictures to train on."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from PIL import Image

from .differentiable import no_training
from .session import ModelDenoiser

_PREVIEW_STEPS = 12
_CFG = 4.5

# preview(denoiser) -> a picture, or None where the device has no room to draw one
ModelPreview = Callable[[ModelDenoiser], Image.Image | None]


def sample(
    model: Any, positive: list, negative: list, shape: Sequence[int], seed: int, steps: int, cfg: float = _CFG
) -> torch.Tensor:
    """A latent of `shape` [1, C, ...] that a MODEL samples, as VAE Decode takes it."""
    latent = torch.zeros(tuple(shape))
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, "dpmpp_2m", "normal", positive, negative, latent, disable_pbar=True, seed=seed
    )


def sample_in_training(
    denoiser: ModelDenoiser, positive: list, negative: list, shape: Sequence[int], seed: int, steps: int,
    cfg: float = _CFG,
) -> torch.Tensor:
    """`sample` by the model of a running session, as it is trained so far."""
    with no_training():
        try:
            return sample(denoiser.patcher, positive, negative, shape, seed, steps, cfg)
        finally:
            denoiser.patcher.pre_run()  # sampling ended with a cleanup of the patcher


def preview_of(
    vae: Any, positive: list, negative: list, shape: Sequence[int], seed: int, cfg: float = _CFG
) -> ModelPreview:
    """A preview of `shape` [1, C, ...] with a fixed prompt and a fixed noise."""

    def preview(denoiser: ModelDenoiser) -> Image.Image | None:
        if not _can_sample(denoiser, shape):
            return None
        latent = sample_in_training(denoiser, positive, negative, shape, seed, _PREVIEW_STEPS, cfg)
        with no_training():
            return _picture(vae, latent, denoiser)

    return preview


def _can_sample(denoiser: ModelDenoiser, shape: Sequence[int]) -> bool:
    """Whether ComfyUI would sample without unloading a part of the model that is in training."""
    management = comfy.model_management
    needed = denoiser.patcher.memory_required([2 * shape[0], *shape[1:]]) + management.extra_reserved_memory()
    return management.get_free_memory(denoiser.device) > 1.1 * max(needed, management.minimum_inference_memory())


def in_colours(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """A latent [B, C, (T,) H, W] in rough colours, [B, (T,) H, W, 3] about 0..1, by its BaseModel's factors."""
    factors = torch.tensor(model.latent_format.latent_rgb_factors)
    bias = torch.tensor(model.latent_format.latent_rgb_factors_bias or [0.0] * 3)
    channels = model.process_latent_in(latent).movedim(1, -1).float().cpu()
    return (channels @ factors + bias + 1) / 2


def _picture(vae: Any, latent: torch.Tensor, denoiser: ModelDenoiser) -> Image.Image:
    """Decoded where the VAE fits beside the training; elsewhere the latent's channels, mapped to colours."""
    needed = vae.memory_used_decode(latent.shape, vae.vae_dtype) + vae.patcher.model_size()
    needed = max(needed, comfy.model_management.minimum_inference_memory())
    if comfy.model_management.get_free_memory(vae.device) > 1.5 * needed:
        pixels = vae.decode(latent)
    else:
        pixels = in_colours(denoiser.model, latent)
    frame = pixels.reshape(-1, *pixels.shape[-3:])[0]
    image = Image.fromarray((frame.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8))
    side = max(image.size)
    return image if side >= 256 else image.resize([n * 256 // side for n in image.size], Image.Resampling.BICUBIC)
