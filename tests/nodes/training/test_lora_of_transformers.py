"""LoRAs of transformers under names that both ComfyUI's own loader and diffusers read, layer by layer."""

import comfy.lora
import diffusers
import pytest
import torch
from diffusers.loaders import lora_pipeline
from pack.nodes.files.fitting import MisfitError, check_lora
from pack.nodes.patching import models
from pack.nodes.training.config import LoraConfig
from pack.nodes.training.lora import LoraLayers, lora_model
from support import families, family_models

# diffusers' network of the same shape, and its loader.
THEIRS = {
    "Flux.1": (lora_pipeline.FluxLoraLoaderMixin, lambda: diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )),
    "Flux.2": (lora_pipeline.Flux2LoraLoaderMixin, lambda: diffusers.Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4),
    )),
    "Qwen-Image": (lora_pipeline.QwenImageLoraLoaderMixin, lambda: diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )),
    "Z-Image": (lora_pipeline.ZImageLoraLoaderMixin, lambda: diffusers.ZImageTransformer2DModel(
        dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
    )),
    "Wan 2.1, 2.2 14B": (lora_pipeline.WanLoraLoaderMixin, lambda: diffusers.WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=32, ffn_dim=64,
    )),
}
FAMILIES = {family.name: family for family in families.FAMILIES}


def trained(name):
    """A tiny MODEL, the LoRA's layers with random weights, and the LoRA's file."""
    model = family_models.build(FAMILIES[name])
    layers = LoraLayers(model.model.diffusion_model, LoraConfig(rank=2, alpha=1.0), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for layer in layers.modules.values():
        layer.up.data = torch.randn(layer.up.shape, generator=generator)
    return model, layers, lora_model(layers, model.model.model_config.unet_config)


@pytest.mark.parametrize("name", THEIRS)
def test_comfyui_and_diffusers_take_every_update_of_the_file(name):
    model, layers, lora = trained(name)
    loader, build = THEIRS[name]
    # diffusers scales some matrices where they are.
    state = loader.lora_state_dict({key: matrix.clone() for key, matrix in lora.items()})
    with torch.device("meta"):
        network = build()
    linear = {layer: module for layer, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    updates = {}
    for key, matrix in state.items():
        layer, _, kind = key.removeprefix("transformer.").rpartition(".lora_")
        assert kind in ("A.weight", "B.weight") and layer in linear, key
        if kind == "B.weight":
            updates[layer] = matrix @ state[key.replace("lora_B", "lora_A")]
            assert updates[layer].shape == linear[layer].weight.shape
    ours = {layer: 0.5 * module.up @ module.down for layer, module in layers.modules.items()}
    # The same numbers arrive, however the layers are cut.
    assert sum(update.numel() for update in updates.values()) == sum(update.numel() for update in ours.values())
    total = sum(float(update.square().sum()) for update in ours.values())
    assert sum(float(update.square().sum()) for update in updates.values()) == pytest.approx(total, rel=1e-4)
    before = model.model.state_dict()
    check_lora(model, lora)
    key = next(key for key in lora if ".lora_up." in key)
    with pytest.raises(MisfitError, match="the model has a layer of shape"):
        check_lora(model, {**lora, key: lora[key][:-1]})
    loaded = models.with_lora(model, weights=lora, strength=1.0)
    for layer, update in ours.items():
        key = f"diffusion_model.{layer}.weight"
        weight = before[key]
        patched = comfy.lora.calculate_weight(loaded.patches[key], weight.clone(), key)
        torch.testing.assert_close(patched - weight, update, rtol=1e-4, atol=1e-5)
