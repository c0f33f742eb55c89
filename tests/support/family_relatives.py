"""More families of the table: relatives of those in families.py, and what enlarges, turns or measures a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from support.families import FAMILIES, Family

_BY_NAME = {family.name: family for family in FAMILIES}


def _like(relative: str, name: str, host_class: str, config: Mapping[str, Any], **changed: Any) -> Family:
    """A family with another's configuration, but for these parts of it."""
    base = _BY_NAME[relative]
    return dataclasses.replace(base, name=name, host_class=host_class, config={**base.config, **config}, **changed)


RELATIVES = (
    _like("SDXL", "SDXL InstructPix2Pix", "SDXL_instructpix2pix", {"in_channels": 8}),
    _like("Cosmos 1", "Cosmos 1 I2V", "CosmosI2V", {"in_channels": 17}),
    _like("CogVideoX", "CogVideoX Inpaint", "CogVideoX_Inpaint", {"in_channels": 48}),
    _like("Hunyuan Video", "SkyReels I2V", "HunyuanVideoSkyreelsI2V", {"in_channels": 32}),
    _like("Wan Camera", "Wan 2.2 Camera", "WAN22_Camera", {"model_type": "camera_2.2", "in_dim": 36}),
    _like("Wan 2.1, 2.2 14B", "Wan Causal Forcing", "WAN21_CausalAR_T2V", {}),
    _like("Wan 2.1, 2.2 14B", "Wan FlowRVS", "WAN21_FlowRVS", {"model_type": "flow_rvs"}),
    Family(
        "HiDream O1", "HiDreamO1",
        {
            "image_model": "hidream_o1",
            "text_config_overrides": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 16, "rope_dims": [4, 2, 2],
            },
            "vision_config_overrides": {
                "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1,
                "num_position_embeddings": 16, "deepstack_visual_indexes": (),
            },
        },
        (3, 64, 64), 1, {"text_input_ids": "ids"},
    ),
    _like(
        "SD 2.1", "SD x4 Upscaler", "SD_X4Upscaler",
        {"in_channels": 7, "num_classes": 1000, "disable_self_attentions": [True, False]},
    ),
    _like("SD 2.1", "Lotus", "LotusD", {"num_classes": "sequential", "adm_in_channels": 4}),
    _like("Stable Video Diffusion", "SV3D u", "SV3D_u", {"adm_in_channels": 256}),
    _like("Stable Video Diffusion", "SV3D p", "SV3D_p", {"adm_in_channels": 1280}),
    Family(
        "Stable Cascade B", "Stable_Cascade_B",
        {
            "stable_cascade_stage": "b", "c_cond": 32, "c_hidden": [32, 32], "nhead": [-1, 2], "c_clip": 12,
            "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 1]], "level_config": ["CT", "CTA"],
        },
        (4, 16, 16), 16, {"pooled_output": (1, 1, 12)},
    ),
    _like("Hunyuan Video 1.5", "Hunyuan Video 1.5 SR", "HunyuanVideo15_SR_Distilled", {"in_channels": 98}),
    _like(
        "PixelDiT", "PiD", "PiD", {"image_model": "pid", "lq_hidden_dim": 16, "lq_num_res_blocks": 1},
        options={"lq_latent": (1, 16, 1, 1), "degrade_sigma": (1,)},
    ),
    Family(
        "SeedVR2", "SeedVR2",
        {
            "image_model": "seedvr2", "vid_dim": 32, "heads": 2, "head_dim": 24, "num_layers": 2, "mm_layers": 1,
            "txt_in_dim": 24, "expand_ratio": 2, "norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True,
            "rope_dim": 24,
        },
        (16, 2, 4, 4), 24, {"condition": (1, 17, 2, 4, 4)},
    ),
)
EVERY = (*FAMILIES, *RELATIVES)

# The other classes of comfy.supported_models, by why they have no model here.
NOT_TRIED = {
    "no picture or video is sampled": (
        "ACEStep", "ACEStep15", "StableAudio", "StableAudio3", "Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1",
        "TripoSplat", "DepthAnything3", "RT_DETR_v4", "SAM3", "SAM31",
    ),
    "a family of the table in another size": (
        "KOALA_1B", "KOALA_700M", "SSD1B", "Segmind_Vega", "SD21UnclipH", "SD21UnclipL", "HunyuanDiT1",
    ),
    "in place of a text it reads a vector of a picture and two angles": ("Stable_Zero123",),
    "it samples latents of another shape than those of its autoencoder": ("HunyuanImage21Refiner",),
}
