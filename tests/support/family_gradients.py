"""A LoRA's gradient through a family's model, against the differences of the loss."""

from __future__ import annotations

import torch
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.lora import LoraLayers
from pack.nodes.training.objective import Denoising
from pack.nodes.training.session import session
from support import family_models


def check(family, model, gradient_checkpointing: bool = False) -> None:
    """The gradient's length is the difference of the loss along it, to 2 %, which is what fp32 leaves of a step that
    moves the loss by a few thousandths. Two steps are extrapolated, so that no third order is left.
    """
    config = TrainingConfig(steps=1, learning_rate=1e-3, gradient_checkpointing=gradient_checkpointing)
    shape = (1, family.latent[0], 1, *family.latent[2:]) if len(family.latent) == 4 else family.shape
    latent, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with torch.inference_mode(), session(model, shape, config) as denoiser:
        conditions = denoiser.prepare(family_models.conditioning(family, 1), latent)
        layers = LoraLayers(denoiser.network, LoraConfig(rank=2), 0, denoiser.device)
        parameters = list(layers.parameters().values())
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(i)
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        denoising = Denoising(denoiser, config)

        def loss():
            level = torch.tensor([len(denoiser.sigmas) // 2])
            return denoising.loss_at(latent, [conditions], noise, level).mean()

        with layers.attached():
            value = loss()
            value.backward()
            reached = [parameter for parameter in parameters if parameter.grad is not None]
            length = float(sum(parameter.grad.square().sum() for parameter in reached)) ** 0.5
            step = min(0.1, 0.004 * value.item() / length)

            def moved(by):
                with torch.no_grad():
                    for parameter in reached:
                        parameter += by * parameter.grad / length
                    return float(loss())

            whole, half = moved(step), moved(-step / 2)
            half -= moved(-step)  # from half a step ahead to half a step behind
            whole -= moved(-step / 2)
            numeric = (4 * half - whole / 2) / (3 * step)
    assert abs(length - numeric) <= 0.02 * length, f"the gradient is {length:.5g} long, the difference {numeric:.5g}"
