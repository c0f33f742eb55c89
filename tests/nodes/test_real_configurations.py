"""The real models on the meta device: what patches, adapters and loaders of this pack rely on.

Expected counts and widths are those of the published models, written down here, not computed by ComfyUI.
"""

import collections

import comfy.model_detection
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from support.real_configurations import REAL_CONFIGURATIONS, build

UNETS = ["SD 1.5", "SD 2.1", "SDXL"]
WANS = ["Wan 2.1 1.3B", "Wan 2.1 14B"]
PARAMETERS = {
    "SD 1.5": 859_520_964, "SD 2.1": 865_910_724, "SDXL": 2_567_463_684,
    "Wan 2.1 1.3B": 1_418_996_800, "Wan 2.1 14B": 14_288_491_584, "Wan 2.2 I2V 14B": 14_288_901_184,
    "Qwen-Image-Edit 2511": 20_430_401_088, "Z-Image": 6_154_908_736,
}
# Cross-attention layers by (input, middle or output block), counting from 0, with their query widths.
FOUR_LEVELS = {
    **{("input", block): (1, 320) for block in (1, 2)}, **{("input", block): (1, 640) for block in (4, 5)},
    **{("input", block): (1, 1280) for block in (7, 8)}, ("middle", 0): (1, 1280),
    **{("output", block): (1, 1280) for block in (3, 4, 5)},
    **{("output", block): (1, 640) for block in (6, 7, 8)},
    **{("output", block): (1, 320) for block in (9, 10, 11)},
}
SDXL = {
    **{("input", block): (2, 640) for block in (4, 5)}, **{("input", block): (10, 1280) for block in (7, 8)},
    ("middle", 0): (10, 1280),
    **{("output", block): (10, 1280) for block in (0, 1, 2)},
    **{("output", block): (2, 640) for block in (3, 4, 5)},
}
BLOCK_MAPS = {"SD 1.5": FOUR_LEVELS, "SD 2.1": FOUR_LEVELS, "SDXL": SDXL}
LAYERS = {"SD 1.5": 16, "SD 2.1": 16, "SDXL": 70, "Wan 2.1 1.3B": 30, "Wan 2.1 14B": 40}
CONTEXT = {"SD 1.5": 768, "SD 2.1": 1024, "SDXL": 2048}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def meta_attention(_attention, *arguments, **options) -> torch.Tensor:
    """PyTorch's attention: ComfyUI's default asks how much memory the device has, and meta has none."""
    return attention_pytorch(*arguments, **options)


@pytest.mark.parametrize("name", REAL_CONFIGURATIONS)
def test_it_is_the_published_model_and_takes_no_memory(name):
    parameters = list(build(name).diffusion_model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[name]
    assert {parameter.device.type for parameter in parameters} == {"meta"}


@pytest.mark.parametrize("name", REAL_CONFIGURATIONS)
def test_comfyui_recognises_it_by_its_key_names(name):
    weights = build(name).diffusion_model.state_dict(prefix="model.diffusion_model.")
    actual = comfy.model_detection.model_config_from_unet(weights, "model.diffusion_model.")
    assert type(actual) is REAL_CONFIGURATIONS[name].host_class


@pytest.mark.parametrize("name", UNETS)
def test_cross_attention_layers_as_a_patch_meets_them(name):
    """A forward pass through ComfyUI's own patch points, on the meta device."""
    model = build(name).diffusion_model
    met, widths = collections.Counter(), {}

    def record(query, key, value, extra_options):
        block = extra_options["block"][:2]
        met[block] += 1
        widths[block] = query.shape[-1]
        assert key.shape[-1] == value.shape[-1] == CONTEXT[name]
        return query, key, value

    labels = meta(2, 2816) if name == "SDXL" else None
    out = model(meta(2, 4, 64, 64), meta(2), meta(2, 77, CONTEXT[name]), y=labels,
                transformer_options={"patches": {"attn2_patch": [record]},
                                     "optimized_attention_override": meta_attention})
    assert out.shape == (2, 4, 64, 64)
    assert {block: (count, widths[block]) for block, count in met.items()} == BLOCK_MAPS[name]
    assert sum(met.values()) == LAYERS[name]


@pytest.mark.parametrize("name", UNETS)
def test_key_names_and_widths_of_the_cross_attention_weights(name):
    weights = build(name).diffusion_model.state_dict()
    keys = [key for key in weights if ".attn2.to_k.weight" in key]
    assert len(keys) == LAYERS[name]
    assert {weights[key].shape[1] for key in keys} == {CONTEXT[name]}
    places = {("middle_block", "1"): "middle"}
    for key in keys:
        kind, number, *_ = key.split(".")
        place = places.get((kind, number), kind.removesuffix("_blocks"))
        block = (place, 0 if place == "middle" else int(number))
        assert weights[key].shape[0] == BLOCK_MAPS[name][block][1], key
        assert weights[key.replace("to_k", "to_v")].shape == weights[key].shape
        assert weights[key.replace("to_k", "to_out.0")].shape[0] == weights[key].shape[0]


@pytest.mark.parametrize(("name", "width", "heads"), [("Wan 2.1 1.3B", 1536, 12), ("Wan 2.1 14B", 5120, 40)])
def test_wan_blocks_key_names_and_widths(name, width, heads):
    model = build(name).diffusion_model
    assert len(model.blocks) == LAYERS[name]
    weights = model.state_dict()
    for block in range(LAYERS[name]):
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                assert weights[f"blocks.{block}.{attention}.{layer}.weight"].shape == (width, width)
            assert weights[f"blocks.{block}.{attention}.norm_k.weight"].shape == (width,)
        assert model.blocks[block].self_attn.num_heads == heads
    assert weights["patch_embedding.weight"].shape == (width, 16, 1, 2, 2)
    assert weights["text_embedding.0.weight"].shape == (width, 4096)


@pytest.mark.parametrize("name", WANS)
def test_wan_blocks_as_a_patch_meets_them(name):
    """81 frames at 832×480 are 21×60×104 latents: 32,760 tokens through each block, in order."""
    model = build(name).diffusion_model
    met = []

    def replace(index):
        def block(arguments, extra):
            assert arguments["img"].shape[1] == 21 * 30 * 52
            met.append(index)
            return extra["original_block"](arguments)

        return block

    patches = {("double_block", index): replace(index) for index in range(LAYERS[name])}
    out = model(meta(1, 16, 21, 60, 104), meta(1), meta(1, 512, 4096),
                transformer_options={"patches_replace": {"dit": patches},
                                     "optimized_attention_override": meta_attention})
    assert out.shape == (1, 16, 21, 60, 104)
    assert met == list(range(LAYERS[name]))
