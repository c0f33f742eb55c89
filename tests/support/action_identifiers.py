"""Random action identifiers for tiny models, and prompts with them, as the nodes make them."""

from __future__ import annotations

import torch
from pack.nodes.action_identifier import encoding, sampling
from pack.nodes.action_identifier.method import ActionIdentifier, Place
from support import tiny_clip

TEXT = "a cat <action> on a beach"


def reading(model):
    """`model` with random weights scaled to its layers, so that it responds to prompts."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.model.diffusion_model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        value = value / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * value + ("weight" in name)
        parameter.data = (value * (3.0 if "attn2" in name and parameter.ndim > 1 else 1.0)).to(parameter.dtype)
    return model


def places(model) -> tuple[Place, ...]:
    return sampling.places(model.model.diffusion_model)


def identifier(
    model, kind: str = "SD 1.5", seed: int = 0, placeholder: str = "<action>", count: int = 1, **metadata
) -> ActionIdentifier:
    """Random tokens for each place of this model and each encoder of this kind of clip."""
    generator = torch.Generator().manual_seed(seed)
    tokens = {
        name: torch.randn(len(places(model)), count, width, generator=generator)
        for name, width in tiny_clip.WIDTHS[kind].items()
    }
    return ActionIdentifier(placeholder, "dancing", tokens, places(model), **metadata)


def prompt(clip, actions, text: str = TEXT) -> list:
    """The output of Encode Action."""
    with torch.inference_mode():
        return sampling.attach_contexts(*encoding.encode(clip, text, actions), actions)


def plain(clip, text: str) -> list:
    """The output of CLIP Text Encode."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))
