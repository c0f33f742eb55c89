"""From pictures and texts of a graph to a trained LORA_MODEL: the path that every LoRA-training node takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from PIL import Image

from . import loop
from .checkpoints import Checkpoints
from .config import LoraConfig, TrainingConfig
from .lora import Adapters
from .lora_files import lora_model
from .objective import DenoisingObjective, Sample
from .runs import LossMap, run
from .session import Denoiser, no_training, session
from .whole_network import WholeNetwork

_PREVIEW_STEPS = 12
_PREVIEW_CFG = 4.5

# make(denoising objective, samples) -> the method's objective
MakeObjective = Callable[[DenoisingObjective, Sequence[Sample]], loop.Objective]


def encode_pictures(vae, pictures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One latent [1, C, ...] for each picture [1, H, W, 3], as VAE Encode makes it.

    Raises ValueError for a picture too small to learn from; warns of edges that the VAE cuts off.
    """
    cell = vae.spacial_compression_encode()
    for height, width in {tuple(picture.shape[1:3]) for picture in pictures}:
        size = f"{width} x {height} pixels"
        if min(height, width) < 4 * cell:
            raise ValueError(f"a picture of {size} is too small to learn from: scale it to the size to generate")
        if height % cell or width % cell:
            logging.warning("[Understudy] pictures of %s are cut to multiples of %d pixels", size, cell)
    return [vae.encode(picture).clone() for picture in pictures]


def encode_texts(clip, texts: Sequence[str]) -> list[list]:
    """One CONDITIONING for each text, as CLIP Text Encode makes it."""
    known: dict[str, list] = {}
    for text in texts:
        if text not in known:
            known[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [known[text] for text in texts]


def train_on_pictures(
    model,
    latents: Sequence[torch.Tensor],
    conditionings: Sequence[list],
    config: TrainingConfig,
    lora: LoraConfig | None,
    *,
    checkpoints: Checkpoints,
    resume_from: str,
    make_objective: MakeObjective | None = None,
    forward_batch: int | None = None,
    preview: Callable[[Denoiser], Image.Image | None] | None = None,
) -> tuple[dict[str, torch.Tensor], LossMap]:
    """Train adapters of `model`, or its whole network where `lora` is None, on latents and their CONDITIONINGs.

    Latents are as VAE Encode gives them. `forward_batch` is how many of them a forward pass takes where the method's
    objective differs from batch_size. Returns the host's LORA_MODEL and LOSS_MAP. The model is used, not changed.
    Raises loop.TrainingDiverged, ValueError as `session` does, and the host's interruption.
    """
    resume = checkpoints.resume(resume_from)
    largest = max(latents, key=lambda latent: latent.numel())
    shape = [forward_batch or config.batch_size, *largest.shape[1:]]
    with session(model, shape, config, whole=lora is None) as denoiser:
        samples = [
            Sample(denoiser.model.process_latent_in(latent.clone()).float(), denoiser.prepare(conditioning, latent))
            for latent, conditioning in zip(latents, conditionings, strict=True)
        ]
        objective: loop.Objective = DenoisingObjective(denoiser, samples, config)
        if make_objective is not None:
            objective = make_objective(objective, samples)
        trained: Adapters | WholeNetwork
        if lora is None:
            trained = WholeNetwork(denoiser.network)
        else:
            trained = Adapters(denoiser.network, lora, config.seed, denoiser.device)
        show = None if preview is None else lambda: preview(denoiser)
        with trained.attached():
            loss_map = run(
                objective, trained.parameters(), config, denoiser.device,
                checkpoints=checkpoints, resume=resume, preview=show,
            )
        return lora_model(trained, denoiser.model.model_config.unet_config), loss_map


def preview_of(
    vae, positive: list, negative: list, shape: Sequence[int], seed: int, cfg: float = _PREVIEW_CFG
):
    """A preview for `train_on_pictures`: one picture of `shape` [1, C, ...] with a fixed prompt and a fixed noise.

    It gives None where the device has no room to sample beside the training.
    """

    def preview(denoiser: Denoiser) -> Image.Image | None:
        if not _room_to_sample(denoiser, shape):
            return None
        samples = draw(denoiser, positive, negative, shape, seed, _PREVIEW_STEPS, cfg)
        with no_training():
            return _picture(vae, samples, denoiser)

    return preview


def draw(
    denoiser: Denoiser, positive: list, negative: list, shape: Sequence[int], seed: int, steps: int,
    cfg: float = _PREVIEW_CFG,
):
    """A latent of `shape` [1, C, ...], as VAE Decode takes it, sampled by the model that is in training."""
    with no_training():
        latent = torch.zeros(tuple(shape))
        noise = comfy.sample.prepare_noise(latent, seed)
        samples = comfy.sample.sample(
            denoiser.patcher, noise, steps, cfg, "dpmpp_2m", "normal", positive, negative, latent,
            disable_pbar=True, seed=seed,
        )
        denoiser.patcher.pre_run()
        return samples


def _room_to_sample(denoiser: Denoiser, shape: Sequence[int]) -> bool:
    """Whether the host would sample without unloading a part of the model that is being trained."""
    management = comfy.model_management
    needed = denoiser.patcher.memory_required([2 * shape[0], *shape[1:]]) + management.extra_reserved_memory()
    return management.get_free_memory(denoiser.device) > 1.1 * max(needed, management.minimum_inference_memory())


def _picture(vae, samples: torch.Tensor, denoiser: Denoiser) -> Image.Image:
    """Decoded where the VAE fits beside the training, else the latent's own colours."""
    needed = vae.memory_used_decode(samples.shape, vae.vae_dtype) + vae.patcher.model_size()
    needed = max(needed, comfy.model_management.minimum_inference_memory())
    if comfy.model_management.get_free_memory(vae.device) > 1.5 * needed:
        pixels = vae.decode(samples)
    else:
        latent_format = denoiser.model.latent_format
        factors = torch.tensor(latent_format.latent_rgb_factors)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0] * 3)
        latent = denoiser.model.process_latent_in(samples).movedim(1, -1).float().cpu()
        pixels = (latent @ factors + bias + 1) / 2
    frame = pixels.reshape(-1, *pixels.shape[-3:])[0]
    image = Image.fromarray((frame.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8))
    side = max(image.size)
    return image if side >= 256 else image.resize([n * 256 // side for n in image.size], Image.Resampling.BICUBIC)
