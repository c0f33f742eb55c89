"""ComfyUI's text encoders with tiny random weights, and its real tokenizers, for tests on the CPU."""

from __future__ import annotations

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch
from support import inference_weights

# Width of each encoder's tokens; those of a kind are joined.
WIDTHS = {"SD 1.5": {"l": 16}, "SD 2.1": {"h": 16}, "SDXL": {"l": 16, "g": 24}}
_CLASSES = {
    "SD 1.5": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "SD 2.1": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
}


def clip(kind: str = "SD 1.5", seed: int = 0, embeddings: str | None = None) -> comfy.sd.CLIP:
    """The one or two text encoders of this kind of model, with three layers; `embeddings` is a folder."""
    config = {"num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    options = {
        f"clip_{name}_model_config": {**config, "hidden_size": width} for name, width in WIDTHS[kind].items()
    }
    target = comfy.supported_models_base.ClipTarget(*_CLASSES[kind])
    encoder = comfy.sd.CLIP(target, embedding_directory=embeddings, model_options=options)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        for name, parameter in encoder.cond_stage_model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in name:
                value = 0.1 * value + name.endswith("weight")
            elif parameter.ndim > 1 and "embedding" not in name:
                value = 2 * value / parameter.shape[-1] ** 0.5
            parameter.data = value.to(parameter.dtype)
    return encoder


def as_loaded(encoder: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """`encoder` as ComfyUI's loaders leave it: its weights are inference tensors."""
    inference_weights.freeze(encoder.cond_stage_model)
    return encoder
