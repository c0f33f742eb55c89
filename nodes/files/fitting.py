"""Whether the weights of a file fit a MODEL, checked before any of them is patched."""

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch

from ..errors import shown_by_name

# The side of a layer's matrix [out, in] that each part of a LoRA must match.
_SIDES = {"up": 0, "down": 1}


@shown_by_name
class MisfitError(ValueError):
    """The weights belong to another model; the message names the first key, its shape and what the model has."""

    def __init__(self, key: str, weight: torch.Tensor, wanted: str):
        super().__init__(f"{key} has shape {tuple(weight.shape)} and the model has {wanted}")


def check_lora(model: Any, lora: Mapping[str, torch.Tensor]) -> None:
    """Raises MisfitError if `model` has no layer that fits a `….lora_up.weight` or `….lora_down.weight`."""
    layers = comfy.lora.model_lora_keys_unet(model.model, {})
    for key, part in lora.items():
        stem, _, name = key.partition(".lora_")
        side = _SIDES.get(name.partition(".")[0])
        if side is None:
            continue
        if stem not in layers:
            raise MisfitError(key, part, "no such layer")
        # Of a layer that others cut into several, ComfyUI says which rows: (name, (dimension, start, length)).
        place, *cut = layers[stem] if isinstance(layers[stem], tuple) else (layers[stem],)
        weight = comfy.utils.get_attr(model.model, place)
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            continue  # a packed weight's shape is not its layer's
        weight = weight.narrow(*cut[0]) if cut else weight
        if part.shape[side : side + 1] != weight.shape[side : side + 1]:
            raise MisfitError(key, part, f"a layer of shape {tuple(weight.shape)}")


def whole_network(model: Any, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights of a whole UNet by ComfyUI's names and in its shapes, from those or diffusers'; and the missing names.

    Raises MisfitError if a weight is not in `model`, or has another shape there.
    """
    state = model.model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    fits = {}
    for key, weight in weights.items():
        name = key if key in state else f"diffusion_model.{names.get(key, key)}"
        if name not in state:
            raise MisfitError(key, weight, "no such weight")
        shape = state[name].shape
        # Projections are convolutions of one pixel in one layout and matrices in the other.
        if weight.shape != shape and weight.squeeze().shape == state[name].squeeze().shape:
            weight = weight.reshape(shape)
        if weight.shape != shape:
            raise MisfitError(key, weight, f"shape {tuple(shape)}")
        fits[name] = weight
    return fits, sorted(key for key in state if key.startswith("diffusion_model.") and key not in fits)
