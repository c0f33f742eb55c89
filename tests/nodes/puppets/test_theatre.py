"""The shipped checkpoint in the host's own loaders, savers and LoRA code."""

import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from pack.nodes.puppets import theatre, tokenizer

CHECKPOINT = "workflows/models/checkpoints/puppets_sd.safetensors"


@pytest.fixture(scope="module")
def loaded(pack_root):
    theatre.register()
    return comfy.sd.load_checkpoint_guess_config(str(pack_root / CHECKPOINT), embedding_directory=None)


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def denoise(model, clip, steps=3):
    import comfy.sample

    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    return comfy.sample.sample(
        model, noise, steps, 4.0, "euler", "normal", encode(clip, "a red striped cat waving on a beach"),
        encode(clip, ""), torch.zeros_like(noise), disable_pbar=True, seed=3,
    )


def test_native_loader_recognises_the_marker_and_only_the_marker(loaded):
    model, clip, vae = loaded[:3]
    assert isinstance(model.model.model_config, theatre.PuppetsSD)
    config = {**theatre.UNET_CONFIG}
    assert theatre.PuppetsSD.matches(config, {theatre.MARKER: 1})
    assert not theatre.PuppetsSD.matches(config, {"input_blocks.0.0.weight": 1})


def test_register_twice_registers_once():
    theatre.register()
    theatre.register()
    assert comfy.supported_models.models.count(theatre.PuppetsSD) == 1


def test_checkpoint_is_small_and_half_precision(pack_root):
    path = pack_root / CHECKPOINT
    assert path.stat().st_size <= 16 * 2**20
    state = comfy.utils.load_torch_file(str(path))
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_text_encoder_equals_transformers(loaded, pack_root):
    """The host's CLIP over our keys gives what transformers' CLIP gives."""
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = loaded[1]
    state = comfy.utils.load_torch_file(str(pack_root / CHECKPOINT))
    prefix = "cond_stage_model.transformer."
    config = {k: v for k, v in theatre.TEXT_CONFIG.items() if k != "architectures"}
    reference = CLIPTextModel(CLIPTextConfig(**config, bos_token_id=1, pad_token_id=0))
    keys = reference.state_dict().keys()
    weights = {}
    for key, value in state.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            weights[name if name in keys else name.removeprefix("text_model.")] = value.float()
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    text = "a red striped cat waving on a beach"
    words = tokenizer.build()(text, padding="max_length", max_length=tokenizer.MAX_TOKENS, return_tensors="pt")
    ids = words["input_ids"]
    with torch.no_grad():
        expected = reference(ids).last_hidden_state
    torch.testing.assert_close(encode(clip, text)[0][0].float(), expected, rtol=0, atol=2e-3)  # fp16 weights


def test_unknown_words_and_weights_are_accepted(loaded):
    clip = loaded[1]
    plain, weighted = (encode(clip, text)[0][0] for text in ("a red cat", "a (red:1.5) cat"))
    assert plain.shape == weighted.shape == (1, tokenizer.MAX_TOKENS, theatre.TEXT_WIDTH)
    assert not torch.equal(plain, weighted)
    assert torch.isfinite(encode(clip, "Schrödinger's zeppelin, 42!")[0][0]).all()


def test_save_and_load_round_trip(loaded, tmp_path):
    model, clip, vae = loaded[:3]
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), model, clip, vae)
    again = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)
    assert isinstance(again[0].model.model_config, theatre.PuppetsSD)
    torch.testing.assert_close(denoise(*again[:2]), denoise(model, clip), rtol=0, atol=0)


def test_clone_and_lora(loaded):
    """A native LoRA on a clone changes the clone alone, and zero strength changes nothing."""
    model, clip = loaded[:2]
    before = denoise(model, clip)
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for key, value in model.model.diffusion_model.state_dict().items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            name = "diffusion_model." + key.removesuffix(".weight")
            lora[f"{name}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=generator) * 0.3
            lora[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=generator) * 0.3
    changed, _ = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    unchanged, _ = comfy.sd.load_lora_for_models(model, clip, lora, 0.0, 0.0)
    assert not torch.allclose(denoise(changed, clip), before, atol=1e-2)
    torch.testing.assert_close(denoise(unchanged.clone(), clip), before, rtol=0, atol=0)
    torch.testing.assert_close(denoise(model, clip), before, rtol=0, atol=0)


def test_vae_round_trip(loaded):
    from pack.nodes.puppets import render, world

    image = torch.from_numpy(render.render(world.sample_take(0, "validation")).image).float().div(255)[None]
    vae = loaded[2]
    latent = vae.encode(image)
    assert latent.shape == (1, 16, 16, 16)
    error = (vae.decode(latent) - image).square().mean()
    assert -10 * torch.log10(error) > 26  # dB
