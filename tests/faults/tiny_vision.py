"""A custom node for these tests, since ComfyUI's loader takes only image encoders of known sizes."""

import comfy.clip_vision
import torch

CONFIG = {
    "model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "quick_gelu", "projection_dim": 12, "num_channels": 3, "image_size": 32,
    "patch_size": 16,
}


class TinyVision:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"default": 12})}}

    def make(self, width):
        vision = comfy.clip_vision.ClipVisionModel({**CONFIG, "projection_dim": width})
        for i, parameter in enumerate(vision.model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.data = (0.3 * drawn + (parameter.ndim == 1)).to(parameter.dtype)
        return (vision,)


NODE_CLASS_MAPPINGS = {"TinyVision": TinyVision}
