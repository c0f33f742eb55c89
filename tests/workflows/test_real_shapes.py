"""Every model file that a template for real models names, in its real shape on the meta device.

ComfyUI's own detection has to know it by its keys and shapes. Numbers of parameters are those of the published
models, written down here.
"""

import inspect
import json
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import pytest
import torch
from launcher import scripts, workflow_files
from support import small_models
from support.real_configurations import REAL_CONFIGURATIONS, build

MODELS = {
    model["name"]: model for path in (scripts.ROOT / "workflows").glob("Real-*.json")
    for model in workflow_files.Workflow(path).models()
}
NETWORKS = {
    "v1-5-pruned-emaonly-fp16.safetensors": "SD 1.5", "v2-1_512-ema-pruned.safetensors": "SD 2.1",
    "v2-1_768-ema-pruned.safetensors": "SD 2.1", "sd_xl_base_1.0.safetensors": "SDXL",
    "wan2.1_t2v_14B_fp8_scaled.safetensors": "Wan 2.1 14B",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "Wan 2.1 14B",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "Wan 2.1 14B",
    "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": "Wan 2.2 I2V 14B",
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": "Wan 2.2 I2V 14B",
    "qwen_image_edit_2511_fp8mixed.safetensors": "Qwen-Image-Edit 2511", "z_image_bf16.safetensors": "Z-Image",
}
# The published number of parameters; Qwen2.5-VL without its last layer, which only writes text.
ENCODERS = {
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": ("T5_XXL", 5_680_910_336),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": ("QWEN25_7B", 7_747_169_280),
    "qwen_3_4b.safetensors": ("QWEN3_4B", 4_022_468_096),
}
AUTOENCODERS = {
    "wan_2.1_vae.safetensors": 126_892_531, "qwen_image_vae.safetensors": 126_892_531, "ae.safetensors": 83_819_683,
}
# Pose, background, masks and appearance are others' networks; the adapter: nodes/video_identity/test_nodes.py.
OTHERS = {
    "sdpose_wholebody_fp16.safetensors", "clip-vit-large-patch14.safetensors", "dinov2-large.safetensors",
    "birefnet.safetensors", "sam3.1_multiplex_fp16.safetensors", "Stand-In_wan2.1_T2V_14B_ver1.0_fp16.safetensors",
    "Stand-In_wan2.2_T2V_A14B_high.ckpt", "Stand-In_wan2.2_T2V_A14B_low.ckpt",
}
META = torch.device("meta")


def test_every_file_is_looked_at():
    tables = [NETWORKS, ENCODERS, AUTOENCODERS, OTHERS]
    assert set(MODELS) == set().union(*tables) and len(MODELS) == sum(map(len, tables))
    assert {name for name in MODELS if name in small_models.FILES} | OTHERS | {
        "v2-1_768-ema-pruned.safetensors"
    } == set(MODELS), "and has a small form"


@pytest.mark.parametrize("name", NETWORKS)
def test_comfyui_knows_the_network(name):
    directory = MODELS[name]["directory"]
    prefix = {"checkpoints": "model.diffusion_model.", "diffusion_models": ""}[directory]
    weights = build(NETWORKS[name]).diffusion_model.state_dict(prefix=prefix)
    assert comfy.model_detection.unet_prefix_from_state_dict(weights) == (prefix or "model.")
    found = comfy.model_detection.model_config_from_unet(weights, prefix)
    assert type(found) is REAL_CONFIGURATIONS[NETWORKS[name]].host_class


def text_encoder(kind):
    arguments = (torch.float16, META, comfy.ops.manual_cast)
    if kind == "T5_XXL":
        file = Path(inspect.getfile(comfy.text_encoders.t5)).with_name("umt5_config_xxl.json")
        return comfy.text_encoders.t5.T5(json.loads(file.read_text(encoding="utf-8")), *arguments)
    classes = {"QWEN25_7B": comfy.text_encoders.llama.Qwen25_7BVLI, "QWEN3_4B": comfy.text_encoders.llama.Qwen3_4B}
    return classes[kind]({}, *arguments)


@pytest.mark.parametrize("name", ENCODERS)
def test_comfyui_knows_the_text_encoder(name):
    kind, count = ENCODERS[name]
    encoder = text_encoder(kind)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    assert comfy.sd.detect_te_model(encoder.state_dict()) == comfy.sd.TEModel[kind]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_comfyui_knows_the_autoencoder(name):
    with META:
        if name == "ae.safetensors":
            sizes = {
                "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
                "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
            }
            parts = {
                f"{part.lower()}_config": {
                    "target": f"comfy.ldm.modules.diffusionmodules.model.{part}", "params": sizes
                }
                for part in ("Encoder", "Decoder")
            }
            regularizer = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
            vae = comfy.ldm.models.autoencoder.AutoencodingEngine(**parts, regularizer_config=regularizer)
        else:
            vae = comfy.ldm.wan.vae.WanVAE(
                dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                temperal_downsample=[False, True, True], dropout=0.0,
            )
        loaded = comfy.sd.VAE(sd=vae.state_dict())
    assert type(loaded.first_stage_model) is type(vae) and loaded.latent_channels == 16
    assert sum(parameter.numel() for parameter in loaded.first_stage_model.parameters()) == AUTOENCODERS[name]
