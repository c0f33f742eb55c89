"""Prior files: ordinary LoRAs with the subject in their metadata, in ComfyUI and in diffusers."""

import json
import logging

import comfy.lora
import comfy.sd
import diffusers
import folder_paths
import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from pack.nodes.files import weights
from pack.nodes.files.names import WeightFileError
from pack.nodes.fingerprint import fingerprint
from pack.nodes.identity_prior import files
from pack.nodes.identity_prior.nodes import UnderstudyLoadIdentityPrior
from pack.nodes.subject_tokens import Subject
from support import tiny_model
from support.identity_trainings import lora_of, saved


def test_the_file_is_an_ordinary_lora_with_its_story(output):
    model = tiny_model.as_loaded(tiny_model.picture())
    lora = lora_of(model, rank=3)
    path = output / "loras" / saved(lora)
    weights = safetensors.torch.load_file(path)
    assert all(torch.equal(weights[key], lora[key]) for key in lora) and weights.keys() == lora.keys()
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    story = json.loads(metadata["understudy_identity"])
    assert story == {"token": "sks", "class_noun": "robot", "captions": ["a sks robot waving"], "base": ""}
    assert metadata["ss_network_dim"] == "3" and float(metadata["ss_network_alpha"]) == 3
    # kohya's own layout: three entries a layer, alpha without dimensions.
    for stem in {key.split(".")[0] for key in weights}:
        assert weights[f"{stem}.alpha"].ndim == 0 and weights[f"{stem}.lora_down.weight"].shape[0] == 3
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    assert len(comfy.lora.load_lora(weights, known)) == len(weights) // 3
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(weights))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=tiny_model.CONTEXT, attention_head_dim=2,
    )
    unet.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    assert len([name for name, _ in unet.named_parameters() if "lora_" in name]) == 2 * len(weights) // 3


def test_loading_equals_the_native_loader_and_priors_mix(output):
    model = tiny_model.as_loaded(tiny_model.picture())
    first, second = lora_of(model, 1), lora_of(model, 2)
    names = [saved(first, prefix="anna"), saved(second, Subject("ohwx", "cat"), prefix="bob")]
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    both, identity, trigger = model, None, ""
    for name in names:
        both, identity, trigger = UnderstudyLoadIdentityPrior.execute(both, name, 0.7).result
    assert trigger == "ohwx cat" and identity.class_noun == "cat"
    native = model
    for lora in (first, second):
        native = comfy.sd.load_lora_for_models(native, None, lora, 0.7, 0)[0]
    sampler = comfy.samplers.sampler_object("euler")
    mixed = tiny_model.sample(both, sampler)
    assert torch.equal(mixed, tiny_model.sample(native, sampler))
    assert not torch.equal(mixed, tiny_model.sample(model, sampler))
    assert UnderstudyLoadIdentityPrior.execute(model, names[0], 0.0).result[0] is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.named_parameters())


def test_another_base_warns_and_another_shape_is_refused(output, caplog):
    model = tiny_model.as_loaded(tiny_model.picture())
    lora = lora_of(model)
    identity = Subject("sks", "robot", (), fingerprint(model))
    name = saved(lora, identity)
    with caplog.at_level(logging.WARNING):
        files.apply(model, lora, identity, 1.0, name)
        assert not caplog.records
        other = tiny_model.picture(seed=1)
        assert len(UnderstudyLoadIdentityPrior.execute(other, name, 1.0).result[0].patches) == len(lora) // 3
    assert "another base model" in caplog.text
    key = next(key for key in lora if key.endswith("attn2_to_k.lora_down.weight"))
    for changed, words in (
        (
            {**lora, key: torch.zeros(2, 99)},
            r"attn2_to_k.lora_down.weight has shape \(2, 99\) and the model has a layer of shape \(32, 16\)",
        ),
        (
            {"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)},
            r"lora_unet_nowhere.lora_up.weight has shape \(2, 2\) and the model has no such layer",
        ),
    ):
        with pytest.raises(WeightFileError, match=f"another kind of model: .*{words}"):
            files.apply(model, changed, identity, 1.0, name)
    assert not model.patches


def test_fingerprints_know_the_base_and_no_lora():
    model = tiny_model.picture()
    base = fingerprint(model)
    assert fingerprint(tiny_model.picture()) == base
    assert fingerprint(tiny_model.picture(seed=1)) != base
    assert fingerprint(tiny_model.picture(in_channels=9)) != base
    patched = comfy.sd.load_lora_for_models(model, None, lora_of(model), 1.0, 0)[0]
    assert fingerprint(patched) == base
    tiny_model.sample(patched, comfy.samplers.sampler_object("euler"), steps=1)
    comfy.model_management.load_models_gpu([patched])
    assert fingerprint(model) == base, "while the LoRA is applied"
    patched.unpatch_model()


def test_a_checkpoint_is_no_prior_and_not_called_damaged(output):
    (output / "loras").mkdir(exist_ok=True)
    torch.save({"state_dict": lora_of(tiny_model.picture())}, output / "loras" / "style.ckpt")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(WeightFileError, match="style.ckpt.*does not describe an identity.*Load LoRA"):
        files.load("style.ckpt")


def test_files_that_are_no_prior_are_refused(output):
    lora = lora_of(tiny_model.picture())
    weights.save(lora, {}, "loras", "plain")
    weights.save(lora, {"understudy_identity": "{}"}, "loras", "broken")
    folder_paths.filename_list_cache.clear()
    for name, words in (("plain_00001_.safetensors", "Load LoRA"), ("broken_00001_.safetensors", "no valid desc")):
        with pytest.raises(WeightFileError, match=words):
            files.load(name)
