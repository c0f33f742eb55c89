"""Shared by the tests of the identity prior: small models of every prediction type, and prompts with a subject."""

from __future__ import annotations

import comfy.model_base
import comfy.samplers
import comfy.supported_models
import torch
from pack.nodes.identity_prior import sampling
from pack.nodes.identity_prior.config import BlendConfig, InversionConfig, MaskConfig
from pack.nodes.identity_prior.inversion import invert
from pack.nodes.subject_tokens import SUBJECT_TOKENS
from support import tiny_model

SHAPE = (1, 4, 8, 8)
COLUMNS = (1, 2)


def v_prediction():
    """The small UNet, treated as one that predicts v."""
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
    return [[tensor, {**options, SUBJECT_TOKENS: columns}] for tensor, options in tiny_model.conditioning(seed)]


def latent(seed: int = 1) -> dict:
    return {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}


def grid(model, steps: int = 6, scheduler: str = "normal") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def inverted(model, *, source=None, sigmas=None, positive=None, method="fixed_point", iterations=4, steps=6, **masks):
    """What Invert Image outputs, in ComfyUI's inference mode."""
    sigmas = grid(model, steps) if sigmas is None else sigmas
    with torch.inference_mode():
        return invert(
            model, prompt() if positive is None else positive, latent() if source is None else source, sigmas,
            InversionConfig(method, iterations), MaskConfig(grow=0, **masks),
        )


MODEL = tiny_model.picture()
FLOW = tiny_model.picture(flow=True)
INVERSIONS = {id(MODEL): inverted(MODEL), id(FLOW): inverted(FLOW)}
EDIT = prompt(5)


def blended(model=MODEL, mask=None, inversion=None, positive=EDIT, start=0.0, end=1.0, **masks):
    """A clone of `model` that blends along its path in INVERSIONS, or along `inversion`."""
    inversion = INVERSIONS[id(model)] if inversion is None else inversion
    return sampling.apply(model, inversion, positive, MaskConfig(**masks), BlendConfig(start, end), mask)


def sample(model, sampler="euler", base=MODEL, inversion=None, **options):
    """A run over the sigmas of the path of `base`, or of `inversion`, by a sampler or its name."""
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    inversion = INVERSIONS[id(base)] if inversion is None else inversion
    options = {"sigmas": torch.tensor(inversion.trajectory.sigmas), "positive": EDIT, **options}
    return tiny_model.sample(model, sampler, **options)


def recorded_inputs(model, patched, sampler, **options):
    """(sigma, x) of each call of the model."""
    calls = []

    def answer(apply_model, args):
        calls.append((float(args["timestep"][0]), args["input"][:1].clone()))
        return apply_model(args["input"], args["timestep"], **args["c"])

    patched = patched.clone()
    patched.set_model_unet_function_wrapper(answer)
    sample(patched, sampler, model, **options)
    return calls
