"""What the tests of the identity prior share: small models of every prediction, and prompts that name a subject."""

from __future__ import annotations

import comfy.model_base
import comfy.samplers
import comfy.supported_models
import tiny_model
import torch
from pack.nodes.identity_prior import capture, inversion
from pack.nodes.identity_prior.config import InversionConfig, MaskConfig

SHAPE = (1, 4, 8, 8)
COLUMNS = (1, 2)


def v_prediction():
    """The small UNet read as one that predicts v."""
    model = tiny_model.picture()
    config = model.model.model_config
    patched = model.clone()
    patched.add_object_patch(
        "model_sampling", comfy.model_base.model_sampling(config, comfy.model_base.ModelType.V_PREDICTION)
    )
    return patched


KINDS = {"eps": tiny_model.picture, "v": v_prediction, "flow": lambda: tiny_model.picture(flow=True)}


def prompt(seed: int = 1, columns=COLUMNS) -> list:
    """A CONDITIONING as Encode Identity makes it."""
    return [[tensor, {**options, capture.SUBJECT_COLUMNS: columns}]
            for tensor, options in tiny_model.conditioning(seed)]


def latent(seed: int = 1) -> dict:
    return {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}


def grid(model, steps: int = 6, scheduler: str = "normal") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def inverted(model, *, given=None, sigmas=None, positive=None, method="fixed_point", iterations=4, steps=6, **masks):
    """What Invert Image finds, in the host's mode."""
    sigmas = grid(model, steps) if sigmas is None else sigmas
    with torch.inference_mode():
        return inversion.run(
            model, prompt() if positive is None else positive, latent() if given is None else given, sigmas,
            InversionConfig(method, iterations), MaskConfig(grow=0, **masks),
        )
