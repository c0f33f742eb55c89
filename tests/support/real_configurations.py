"""The real models' shapes, built from ComfyUI's own classes on the meta device: in seconds, without memory.

Configurations as published: Stable Diffusion 1.5 and 2.1 and SDXL (their `unet/config.json`, in the names of
the original code), Wan 2.1 T2V 1.3B and 14B, whose sizes Wan 2.2's models share, Wan 2.2 I2V, Qwen-Image and
Z-Image (their `config.json`).
"""

from dataclasses import dataclass

import comfy.model_base
import comfy.supported_models
import torch

_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": None,
    "dropout": 0, "conv_resample": True, "dims": 2, "num_classes": None, "use_checkpoint": False,
    "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False, "use_temporal_resblock": False, "transformer_depth_middle": 1,
}
_FOUR_LEVELS = {
    "channel_mult": (1, 2, 4, 4), "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16,
    "freq_dim": 256, "text_dim": 4096, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}
_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}


@dataclass(frozen=True)
class RealConfiguration:
    """A published model: ComfyUI's class for it and the arguments of its diffusion model."""

    host_class: type
    unet_config: dict
    parameters: float  # as the publishers count the diffusion model, in billions


REAL_CONFIGURATIONS = {
    "SD 1.5": RealConfiguration(
        comfy.supported_models.SD15,
        {**_UNET, **_FOUR_LEVELS, "context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False},
        0.860,
    ),
    "SD 2.1": RealConfiguration(
        comfy.supported_models.SD20,
        {
            **_UNET, **_FOUR_LEVELS, "context_dim": 1024, "num_head_channels": 64,
            "use_linear_in_transformer": True,
        },
        0.866,
    ),
    "SDXL": RealConfiguration(
        comfy.supported_models.SDXL,
        {
            **_UNET, "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2], "context_dim": 2048,
            "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64,
            "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
        },
        2.567,
    ),
    "Wan 2.1 1.3B": RealConfiguration(
        comfy.supported_models.WAN21_T2V,
        {**_WAN, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 1.42,
    ),
    "Wan 2.1 14B": RealConfiguration(
        comfy.supported_models.WAN21_T2V,
        {**_WAN, **_14B}, 14.3,
    ),
    "Wan 2.2 I2V 14B": RealConfiguration(
        # It reads no CLIP Vision, by which ComfyUI tells Wan 2.1's.
        comfy.supported_models.WAN21_T2V, {**_WAN, **_14B, "in_dim": 36}, 14.3,
    ),
    "Qwen-Image-Edit 2511": RealConfiguration(
        comfy.supported_models.QwenImage,
        {
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "num_attention_heads": 24,
            "attention_head_dim": 128, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
            "default_ref_method": "index_timestep_zero",
        },
        20.4,
    ),
    "Z-Image": RealConfiguration(
        comfy.supported_models.ZImage,
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560,
            "n_layers": 30, "n_refiner_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30,
            "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
        6.15,
    ),
}


# Flux.1 dev and Kontext, whose guidance and pooled text ComfyUI adds: for what needs no file of theirs.
FLUX = RealConfiguration(
    comfy.supported_models.Flux,
    {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
        "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
        "guidance_embed": True, "txt_ids_dims": [],
    },
    11.9,
)


def build(name: str, dtype: torch.dtype = torch.float16) -> comfy.model_base.BaseModel:
    """ComfyUI's model of `REAL_CONFIGURATIONS[name]`, with every parameter on the meta device."""
    real = REAL_CONFIGURATIONS[name]
    model_config = real.host_class({**real.unet_config, "dtype": dtype})
    return model_config.get_model({}, device=torch.device("meta"))
