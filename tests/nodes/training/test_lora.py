"""The names that other programs look for in a LoRA file, on the real shape of SDXL."""

from types import SimpleNamespace

import comfy.lora
import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from pack.nodes.training.config import LoraConfig
from pack.nodes.training.lora import LoraLayers, lora_model
from support.real_configurations import REAL_CONFIGURATIONS, build


@pytest.fixture(scope="module")
def model():
    return build("SDXL")


@pytest.fixture(scope="module")
def lora(model):
    adapters = LoraLayers(model.diffusion_model, LoraConfig(rank=1), 0, torch.device("cpu"))
    return lora_model(adapters, REAL_CONFIGURATIONS["SDXL"].unet_config)


def test_sdxl_has_the_names_of_kohya_s_files(model, lora):
    """As kohya's trainer writes them, whose SDXL has the original blocks; 70 transformers of 8 linear layers."""
    stems = {key.split(".")[0] for key in lora}
    assert len(stems) == 70 * 8
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0" in stems
    assert stems <= comfy.lora.model_lora_keys_unet(model, {}).keys()


def test_diffusers_finds_every_layer_of_sdxl(lora):
    converted, _ = _convert_non_diffusers_lora_to_diffusers(
        _maybe_map_sgm_blocks_to_diffusers(dict(lora), SimpleNamespace(layers_per_block=2))
    )
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        )
    linear = {name: layer for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)}
    ups = {key: weight for key, weight in converted.items() if "_lora.up" in key}
    assert len(ups) == 70 * 8
    for key, weight in ups.items():
        name = key.removeprefix("unet.").replace(".processor.", ".").split("_lora.")[0]
        name += ".0" if name.endswith("to_out") else ""
        assert linear[name].out_features == weight.shape[0], key
