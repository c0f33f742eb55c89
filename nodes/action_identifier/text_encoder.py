"""The host's text encoder with gradients to the vectors in a prompt, for as long as a training lasts."""

from __future__ import annotations

from typing import Any

import torch

from ..training.session import clone_without_streaming
from .encoding import Tokens


class TextEncoder:
    """A CLIP of its own over the same weights. Raises ValueError where they stream in and cannot be loaded whole."""

    def __init__(self, clip: Any):
        self.clip = clip.clone()
        self.clip.patcher = clone_without_streaming(clip.patcher)
        self.clip.cond_stage_model = self.clip.patcher.model
        self.patcher = self.clip.patcher

    def encode(self, tokens: Tokens) -> list[torch.Tensor]:
        """The one conditioning tensor [1, T, C] of the host's tokens, with its CLIP skip; the encoder is loaded."""
        stage = self.clip.cond_stage_model
        stage.reset_clip_options()
        if self.clip.layer_idx is not None:
            stage.set_clip_options({"layer": self.clip.layer_idx})
        stage.set_clip_options({"execution_device": self.patcher.load_device})
        return [stage.encode_token_weights(tokens)[0]]
