"""The maps of real networks: every layer that reads a prompt, once, and where the network's own blocks have it."""

import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from pack.nodes.patching import models, unet_layers, wan_blocks
from support import tiny_model
from support.real_configurations import build


@pytest.mark.parametrize(("name", "count"), {"SD 1.5": 16, "SD 2.1": 16, "SDXL": 70}.items())
def test_a_unet_s_layers_are_all_that_it_has(name, count):
    network = build(name).diffusion_model
    layers = unet_layers.cross_attentions(network)
    parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    reached = [
        id(transformer)
        for part, block, index, _ in layers
        for module in parts[part][block] if isinstance(module, SpatialTransformer)
        for i, transformer in enumerate(module.transformer_blocks) if i == index
    ]
    every = [
        id(transformer)
        for module in network.modules() if isinstance(module, SpatialTransformer)
        for transformer in module.transformer_blocks
    ]
    assert len(reached) == len(layers) == count and reached == every
    assert [layer.place for layer in layers] == [tuple(layer[:3]) for layer in layers]


@pytest.mark.parametrize("model", [tiny_model.picture, tiny_model.xl], ids=["SD", "SDXL"])
def test_a_unet_calls_the_patches_of_its_layers_in_this_order_with_these_sizes(model):
    model = model()
    layers = unet_layers.cross_attentions(model.model.diffusion_model)
    seen = []

    def recording(layer):
        def make(_earlier):
            def patch(q, k, v, options):
                seen.append((layer, q.shape[1]))
                return v.mean(1, keepdim=True).expand_as(q).contiguous()

            return patch

        return make

    patched = models.with_cross_attention_patches(
        model, key="test", patches={layer.place: recording(layer) for layer in layers}
    )
    side, width = 16, model.model.model_config.unet_config["context_dim"]
    prompt = [[torch.ones(1, 3, width), {"pooled_output": torch.ones(1, 24)}]]
    euler = comfy.samplers.sampler_object("euler")
    tiny_model.sample(
        patched, euler, steps=1, shape=(1, 4, side, side), cfg=1.0, positive=prompt, negative=prompt
    )
    assert seen == [(layer, (side // layer.factor) ** 2) for layer in layers]


def test_a_wan_has_one_layer_a_block_but_for_the_autoregressive_one():
    network = tiny_model.wan().model.diffusion_model
    layers = wan_blocks.cross_attentions(network)
    assert [layer.place for layer in layers] == [("double_block", i, 0) for i in range(len(network.blocks))]
    causal = tiny_model.wan("causal").model.diffusion_model
    assert wan_blocks.is_wan(causal) and not wan_blocks.runs_patches(causal)
    for other in (causal, torch.nn.Linear(1, 1)):
        assert wan_blocks.cross_attentions(other) == () == unet_layers.cross_attentions(other)


def test_block_patches_of_two_keys_run_one_around_the_other_and_change_nothing_by_themselves():
    calls = []

    def patch_of(name):
        class Patch(wan_blocks.WanBlockPatch):
            key = name

            def __call__(self, args, extra):
                calls.append((name, self.index))
                return self._inner(args, extra)

        return Patch

    model = tiny_model.wan()
    network = model.model.diffusion_model
    patched = model
    for name in ("first", "second", "first"):
        patched = models.with_block_patches(patched, key=name, patches=patch_of(name).for_every_block(network))
    shape = (1, 16, 1, 8, 8)
    plain, actual = (
        tiny_model.sample(one, comfy.samplers.sampler_object("euler"), steps=1, shape=shape, cfg=1.0)
        for one in (model, patched)
    )
    assert torch.equal(actual, plain)
    assert calls == [(name, i) for i in range(len(network.blocks)) for name in ("first", "second", "first")]


def test_an_override_hands_the_attention_to_the_one_before_it():
    def attention(q, k, v, heads, scale=1):
        return q * heads * scale

    def earlier(function, *args, **kwargs):
        return function(*args, **kwargs) + 1

    q = torch.ones(1, 2, 4)
    assert torch.equal(wan_blocks.AttentionOverride(None)._inner(attention, q, q, q, 2, scale=3), 6 * q)
    assert torch.equal(wan_blocks.AttentionOverride(earlier)._inner(attention, q, q, q, 2, scale=3), 6 * q + 1)
