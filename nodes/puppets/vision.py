"""The theatre's image encoder: ComfyUI's own CLIP vision class, small enough to train on a CPU.

ComfyUI's loader knows encoders by their number of layers and takes none of this size, so this builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.clip_vision
import torch

from ..files import weights
from .menus import MODELS

# In no list of ComfyUI: its own loader would refuse the file.
FILE = MODELS / "clip_vision" / "puppets_vision.safetensors"
# Half the side of the theatre's pictures; 64 places and a class token.
VISION_CONFIG = {
    "model_type": "clip_vision_model", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 512, "hidden_act": "quick_gelu", "projection_dim": 128, "num_channels": 3,
    "image_size": 64, "patch_size": 8, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}


def vision(weights: Mapping[str, torch.Tensor]) -> Any:
    """A CLIP_VISION with these weights, under ComfyUI's names and in its precision for encoders."""
    made = comfy.clip_vision.ClipVisionModel(dict(VISION_CONFIG))
    made.model.load_state_dict(dict(weights))
    return made


def shipped() -> Any:
    """The CLIP_VISION that was trained on the theatre. Raises WeightFileError where its file is gone or damaged."""
    return vision(weights.read(FILE)[0])
