"""MODELs, prompts and latents of the families in families.py."""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.model_patcher
import comfy.nested_tensor
import comfy.supported_models
import torch
from comfy.ldm.hidream_o1.model import TMS_TOKEN_ID
from support.families import TOKENS, Family

CPU = torch.device("cpu")


def build(family: Family, seed: int = 0, dtype=torch.float32, compute=None, operations=None):
    """A MODEL of this family, its weights far from uniform and of a size that keeps what passes through it."""
    host_class = getattr(comfy.supported_models, family.host_class)
    config = host_class({**host_class.unet_config, **family.config, "dtype": dtype})
    config.unet_config.update(family.config)  # again, since a class may set sizes of its own
    config.custom_operations = operations
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, device=CPU).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        vector = parameter.ndim <= 1 or "norm" in name and parameter.numel() == max(parameter.shape)
        if vector or not parameter.numel():
            value = 0.1 * value + ("norm" in name and not name.endswith("bias"))
        else:
            value = value / parameter[0].numel() ** 0.5
        parameter.data = value.to(parameter.dtype)
        parameter.requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("pos_embed"):  # a file's; ComfyUI leaves it as memory was
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def detected(model: comfy.model_patcher.ModelPatcher, family: Family) -> bool:
    """Whether ComfyUI finds the class of this family by these weights alone."""
    try:
        found = comfy.model_detection.model_config_from_unet(model.model.diffusion_model.state_dict(), "")
    except (KeyError, IndexError, AttributeError, ValueError, ZeroDivisionError):
        return False
    return type(found).__name__ == family.host_class


def conditioning(family: Family, seed: int, tokens: int = TOKENS, **more: Any) -> list:
    """A CONDITIONING with random tokens and what else prompts of this family carry."""
    generator = torch.Generator().manual_seed(seed)

    def value(shape):
        if shape == "ones":
            return torch.ones(1, tokens, dtype=torch.long)
        if shape == "ids":  # of a tokenizer, whose last marks the place of the time step
            words = torch.randint(0, 1000, (1, tokens - 1), generator=generator)
            return torch.cat([words, torch.tensor([[TMS_TOKEN_ID]])], 1)
        return torch.randn(shape, generator=generator) if isinstance(shape, tuple) else shape

    options = {name: value(shape) for name, shape in family.options.items()}
    return [[torch.randn(1, tokens, family.text, generator=generator), {**options, **more}]]


def latent(family: Family, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A random latent as ComfyUI's VAE Encode or an empty latent node makes it; video and sound in one where there
    are both.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [scale * torch.randn(1, *shape, generator=generator) for shape in (family.latent, family.audio) if shape]
    return parts[0] if len(parts) == 1 else comfy.nested_tensor.NestedTensor(parts)
