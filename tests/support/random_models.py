"""Real models of ComfyUI in their published shapes with random weights on a device, or narrow ones for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from support.real_configurations import FLUX, REAL_CONFIGURATIONS


@dataclasses.dataclass(frozen=True)
class Shape:
    """A latent and a prompt of a family at a usual size, and what makes a narrow model with the same layers."""

    latent: tuple[int, ...]
    tokens: int
    narrow: Mapping[str, Any]
    narrow_latent: tuple[int, ...]
    pooled: int | None = None


SHAPES = {
    "SD 1.5": Shape((4, 64, 64), 77, {"model_channels": 32, "num_heads": 4, "context_dim": 32}, (4, 16, 16)),
    "SDXL": Shape(
        (4, 128, 128), 77, {"model_channels": 32, "num_head_channels": 16, "context_dim": 32}, (4, 16, 16), 1280
    ),
    "Flux.1": Shape(
        (16, 128, 128), 512,
        {
            "hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "context_in_dim": 32,
            "axes_dim": [16, 56, 56],
        },
        (16, 16, 16), 768,
    ),
    "Wan 2.1 14B": Shape(
        (16, 21, 60, 104), 512,
        {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": 32, "freq_dim": 32}, (16, 3, 8, 8),
    ),
}


class RandomModel:
    """ComfyUI's MODEL of a family in SHAPES, with latents and prompts for it."""

    def __init__(
        self, family: str, device: torch.device, dtype: torch.dtype, compute: torch.dtype | None = None,
        narrow: bool = False, offload: torch.device | None = None, **changes: Any,
    ):
        """Stored in `dtype` and computed in `compute`, if that differs; on `offload` until it is loaded."""
        shape, real = SHAPES[family], {**REAL_CONFIGURATIONS, "Flux.1": FLUX}[family]
        self.family, self.tokens, self.pooled = family, shape.tokens, shape.pooled
        self.latent = shape.narrow_latent if narrow else shape.latent
        config = {**real.unet_config, **(shape.narrow if narrow else {}), **changes, "dtype": dtype}
        self.width = next(config[key] for key in ("context_dim", "text_dim", "context_in_dim") if key in config)
        host = real.host_class(config)
        host.set_inference_dtype(dtype, compute)
        model = host.get_model({}, device=offload or device).eval()
        fill(model, device)
        self.model = comfy.model_patcher.ModelPatcher(model, device, offload or device)

    @property
    def network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model

    def noise(self, seed: int) -> torch.Tensor:
        """A latent [1, C, (T,) H, W] on the CPU, as nodes hand it on."""
        return torch.randn(1, *self.latent, generator=torch.Generator().manual_seed(seed))

    def conditioning(self, seed: int, **more: Any) -> list:
        """A CONDITIONING of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        pooled = {} if self.pooled is None else {"pooled_output": torch.randn(1, self.pooled, generator=generator)}
        return [[torch.randn(1, self.tokens, self.width, generator=generator), {**pooled, **more}]]

    def sigmas(self, steps: int) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps)

    def sample(
        self, model=None, sampler=None, positive=None, negative=None, steps: int = 1, cfg: float = 2.0, seed: int = 3,
        callback=None,
    ) -> torch.Tensor:
        """What SamplerCustom does."""
        guider = comfy.samplers.CFGGuider(model or self.model)
        guider.set_conds(positive or self.conditioning(1), negative or self.conditioning(2))
        guider.set_cfg(cfg)
        with torch.inference_mode():
            return guider.sample(
                self.noise(seed), torch.zeros(1, *self.latent), sampler or comfy.samplers.sampler_object("euler"),
                self.sigmas(steps), callback=callback, disable_pbar=True, seed=seed,
            )


def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Weights that keep the size of what passes through them: drawn on `device`, whatever they are stored in."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        if name.endswith("modulation"):
            value *= 0.5
        elif parameter.ndim > 1:
            value /= parameter[0].numel() ** 0.5
        else:
            value *= 0.1
            value += name.endswith("weight")  # of a norm
        parameter.data = value.to(parameter.device, parameter.dtype)
        parameter.requires_grad_(False)
