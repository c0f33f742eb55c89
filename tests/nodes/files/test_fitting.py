"""Which weights fit a model: every layer of a LoRA by name and shape, and a whole UNet under either naming."""

import comfy.utils
import pytest
import torch
from pack.nodes.files.fitting import MisfitError, check_lora, whole_network
from support import tiny_model

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"  # [32, 16]


class Packed(torch.Tensor):
    """A weight whose shape is not that of its layer, as packs for GGUF files have."""


def lora(up=(32, 2), down=(2, 16), stem=STEM, **others):
    return {f"{stem}.lora_up.weight": torch.zeros(up), f"{stem}.lora_down.weight": torch.zeros(down), **others}


@pytest.mark.parametrize(("weights", "words"), [
    (lora(), None),
    (lora(others=torch.ones(())), None),
    ({f"{STEM}.lora_A.weight": torch.zeros(99, 99), f"{STEM}.alpha": torch.ones(())}, None),
    (lora(up=(31, 2)), r"lora_up.weight has shape \(31, 2\) and the model has a layer of shape \(32, 16\)"),
    (lora(down=(2, 17)), r"lora_down.weight has shape \(2, 17\) and the model has a layer of shape \(32, 16\)"),
    (lora(down=(16,)), r"lora_down.weight has shape \(16,\)"),
    (lora(stem="lora_unet_nowhere"), r"nowhere.lora_up.weight has shape \(32, 2\) and the model has no such layer"),
])
def test_a_lora_fits_by_every_layer(weights, words):
    model = tiny_model.picture()
    if words is None:
        check_lora(model, weights)
        return
    with pytest.raises(MisfitError, match=words):
        check_lora(model, weights)


def test_a_packed_weight_has_no_shape_to_compare():
    model = tiny_model.picture()
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k
    del layer.weight
    layer.weight = torch.zeros(3, 3).as_subclass(Packed)
    check_lora(model, lora())


def test_a_whole_unet_fits_under_both_namings_and_says_what_it_lacks():
    model = tiny_model.picture()
    ours = {name: weight for name, weight in model.model.state_dict().items() if name.startswith("diffusion_model.")}
    theirs = {
        key: ours[f"diffusion_model.{name}"].squeeze()
        for key, name in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
        if f"diffusion_model.{name}" in ours
    }
    for weights in (ours, theirs):
        dropped = next(iter(weights))
        part = {key: weight for key, weight in weights.items() if key != dropped}
        fits, missing = whole_network(model, part)
        assert fits.keys() | set(missing) == ours.keys() and len(fits) == len(part)
        assert all(torch.equal(weight, ours[name]) for name, weight in fits.items())
