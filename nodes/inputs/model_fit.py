"""What nodes check of texts and latents against the model that will read them, before it runs.

Every function raises ValueError, naming the input, what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from . import latents

# What texts enter in transformers: Wan, SD 3, Flux.
_TEXT_LAYERS = ("text_embedding.0", "context_embedder", "txt_in")


def text_width(network: Any) -> int | None:
    """How many channels a text's tokens have for this diffusion model; None where its structure does not say."""
    modules = network.named_modules()
    if isinstance(network, UNetModel):
        layer = next((module for name, module in modules if name.endswith("attn2.to_k")), None)
    else:
        layer = next((module for name, module in modules if name in _TEXT_LAYERS), None)
    return getattr(layer, "in_features", None)


def check_texts(
    conditionings: Sequence[list], name: str, model: Any, fix: str = "connect the CLIP that belongs to this model"
) -> None:
    """CONDITIONINGs are of this MODEL's text encoder, as far as their width tells."""
    expected = text_width(model.get_model_object("diffusion_model"))
    for text in (entry[0] for conditioning in conditionings for entry in conditioning):
        if expected is not None and isinstance(text, torch.Tensor) and text.shape[-1] != expected:
            raise ValueError(
                f"{name} encodes texts in {text.shape[-1]} channels and the model reads {expected}, so it is another "
                f"model's: {fix}"
            )


def check_latents(
    samples: Sequence[torch.Tensor], name: str, model: Any, fix: str = "encode it with the VAE of this model"
) -> None:
    """Latents [B, C, ...] have this MODEL's channels and dimensions."""
    latent_format = model.model.latent_format
    channels, dimensions = latent_format.latent_channels, latent_format.latent_dimensions
    for latent in samples:
        latents.check_channels(latent, name, channels, fix)
        if latent.ndim != 2 + dimensions:
            expected = f"[B, {channels}, {'T, ' if dimensions == 3 else ''}H, W]"
            raise ValueError(
                f"{name} has shape {tuple(latent.shape)} and the model's latents are {expected}: {fix}"
            )


def check_encoded(conditionings: Sequence[list], samples: Sequence[torch.Tensor], model: Any) -> None:
    """What a node encoded itself, with its inputs `clip` and `vae`."""
    check_texts(conditionings, "clip", model)
    check_latents(samples, "what vae encodes", model, "connect the VAE that belongs to this model")
