"""Image encoders of ComfyUI: whole pictures, gradients beside transformers, and descriptions that are refused."""

import types

import comfy.clip_vision
import comfy.model_patcher
import pytest
import torch
import transformers
from pack.kernels.fusion_embedding import combine
from pack.nodes.fingerprint import weights_fingerprint
from pack.nodes.fusion_embedding import encoding, method, nodes
from pack.nodes.fusion_embedding.method import Fusion, FusionError
from pack.nodes.puppets.vision import VISION_CONFIG, vision
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.session import encoder_session
from support import fusions


def transformers_model(clip_vision):
    """transformers' own CLIP with the same weights."""
    config = transformers.CLIPVisionConfig(**{
        key: clip_vision.config[key] for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "projection_dim", "image_size", "patch_size",
        )
    })
    model = transformers.CLIPVisionModelWithProjection(config)
    model.load_state_dict({key: value.float() for key, value in clip_vision.get_sd().items()}, strict=False)
    return model


def pixels(clip_vision, pictures):
    """Squeezed to the encoder's square and normalised, by hand."""
    side = clip_vision.image_size
    x = torch.nn.functional.interpolate(pictures.movedim(-1, 1), (side, side), mode="bicubic", antialias=True)
    return ((255 * x).clamp(0, 255).round() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("size", [(32, 32), (64, 40)])
def test_embeddings_and_states_are_transformers(size):
    clip_vision, pictures = fusions.vision(), fusions.pictures(3, *size)
    with torch.no_grad():
        expected = transformers_model(clip_vision)(pixels(clip_vision, pictures))
    actual = encoding.embeddings(clip_vision, pictures)
    torch.testing.assert_close(actual, expected.image_embeds, rtol=1e-3, atol=1e-4)
    actual = encoding.states(clip_vision, pictures)
    torch.testing.assert_close(actual, expected.last_hidden_state, rtol=1e-3, atol=1e-4)


def test_more_pictures_than_go_in_one_pass():
    clip_vision, pictures = fusions.vision(), fusions.pictures(19, 32, 32)
    actual = encoding.embeddings(clip_vision, pictures)
    torch.testing.assert_close(actual[17:18], encoding.embeddings(clip_vision, pictures[17:18]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_transformers(checkpointing):
    """Through ComfyUI's encoder, whose layers add in place, as loaded: inference tensors."""
    clip_vision, pictures = fusions.as_loaded(fusions.vision()), fusions.pictures(2, 40, 32)
    theirs = transformers_model(clip_vision)
    theirs(pixels(clip_vision, pictures)).image_embeds.square().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    config = TrainingConfig(steps=1, learning_rate=1e-3, gradient_checkpointing=checkpointing)
    with torch.inference_mode(), encoder_session(clip_vision.patcher, 0, config) as module:
        from pack.nodes.training.whole_network import WholeNetwork

        trained = WholeNetwork(module)
        with trained.attached():
            encode = encoding.differentiable(clip_vision, module)
            actual = encode(list(pictures.split(1)))
            torch.testing.assert_close(actual.detach(), encoding.embeddings(clip_vision, pictures))
            actual.square().sum().backward()
    gradients = {name: p.grad for name, p in trained.parameters().items()}
    assert expected.keys() == {name for name, gradient in gradients.items() if gradient is not None}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=1e-4 * scale)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in clip_vision.model.modules())


def test_an_encoder_of_another_width_is_refused_with_both_widths():
    with pytest.raises(FusionError, match="embeddings of 20 numbers and the combiner takes 12"):
        encoding.fused(fusions.combiner(), fusions.vision(width=20), fusions.pictures(), fusions.poses())


def test_the_fusion_s_own_encoder_goes_first():
    original, other = fusions.vision(), fusions.vision(seed=1)
    assert encoding.encoder_for(Fusion(encoder=original), other) is original
    assert encoding.encoder_for(Fusion(), other) is other
    with pytest.raises(FusionError, match="clip_vision"):
        encoding.encoder_for(Fusion(), None)


def test_another_encoder_of_the_combiner_s_width_is_known_by_its_probe():
    original = fusions.vision()
    with_frozen = Fusion(probe=encoding.probe(original))
    assert encoding.encoder_for(with_frozen, original) is original
    in_bf16 = fusions.vision()
    in_bf16.model.load_state_dict({k: v.bfloat16().to(v.dtype) for k, v in in_bf16.model.state_dict().items()})
    assert encoding.encoder_for(with_frozen, in_bf16) is in_bf16
    with pytest.raises(FusionError, match="another encoder than the one"):
        encoding.encoder_for(with_frozen, fusions.vision(seed=1))
    both = Fusion(encoder=original, probe=encoding.probe(original))
    assert encoding.encoder_for(both, fusions.vision(seed=1)) is original


def test_fused_is_the_combiner_without_dropout():
    clip_vision, combiner = fusions.vision(), fusions.combiner()
    source, pose = fusions.pictures(2), fusions.poses(2)
    actual = encoding.fused(combiner, clip_vision, source, pose)
    assert torch.equal(actual, encoding.fused(combiner, clip_vision, source, pose))
    by_source, by_pose = (encoding.embeddings(clip_vision, x) for x in (source, pose))
    assert torch.equal(actual, combine(by_source, by_pose, combiner))


def test_other_kinds_of_encoder_cannot_be_trained():
    clip_vision = fusions.vision()
    clip_vision.model_type = "siglip2_vision_model"
    with pytest.raises(FusionError, match="train_encoder off"):
        encoding.differentiable(clip_vision, clip_vision.model)


def test_an_encoder_is_built_again_from_its_description():
    built = fusions.vision()
    again = encoding.rebuild(built.config, built.get_sd())
    pictures = fusions.pictures(2)
    assert torch.equal(encoding.embeddings(built, pictures), encoding.embeddings(again, pictures))


def test_an_encoder_has_comfyui_s_precision_where_weights_stream(monkeypatch):
    """There ComfyUI takes the given tensors themselves."""
    built = fusions.vision()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda _patcher: True)
    again = encoding.rebuild(built.config, {key: weight.double() for key, weight in built.get_sd().items()})
    assert {key: w.dtype for key, w in again.get_sd().items()} == {key: w.dtype for key, w in built.get_sd().items()}


@pytest.mark.parametrize("changed", [
    {"model_type": "bert"}, {"hidden_size": 1 << 40}, {"num_hidden_layers": 10**6}, {"hidden_size": -4},
    {"patch_size": 0}, {"hidden_act": "none such"}, {"image_size": 65535, "patch_size": 1}, {"hidden_size": "16"},
    {"num_attention_heads": 0}, {"num_hidden_layers": 3}, {"projection_dim": 13}, {"hidden_size": 48},
    {"intermediate_size": "wide"}, {"intermediate_size": None}, {"image_mean": "grey"}, {"image_std": [1.0]},
    {"image_mean": [0.5, 0.5, None]},
])
def test_descriptions_that_do_not_fit_are_refused(changed):
    built = fusions.vision()
    with pytest.raises(FusionError, match="its image encoder"):
        encoding.rebuild({**built.config, **changed}, built.get_sd())


def test_many_narrow_layers_are_refused_before_they_are_built():
    built = fusions.vision()
    with pytest.raises(FusionError, match="1000 layers of width 16, more than any"):
        encoding.rebuild({**built.config, "num_hidden_layers": 1000}, built.get_sd())


def test_the_theatre_s_encoder_is_comfyui_s_class_at_a_size_for_a_cpu():
    import comfy.clip_model
    import comfy.clip_vision

    original = comfy.clip_vision.ClipVisionModel(dict(VISION_CONFIG))
    weights = {key: torch.randn(value.shape, generator=fusions.generator(i)).half() / 20
               for i, (key, value) in enumerate(original.get_sd().items())}
    built = vision(weights)
    assert isinstance(built.model, comfy.clip_model.CLIPVisionModelProjection)
    assert sum(value.numel() for value in weights.values()) < 1_000_000
    assert encoding.embeddings(built, fusions.pictures(2, 128, 128)).shape == (2, 128)
    assert encoding.states(built, fusions.pictures(1, 128, 128)).shape == (1, 65, 128)


def test_numbers_that_are_none_are_refused_before_they_blacken_a_picture():
    broken = fusions.pictures().fill_(float("nan"))
    with pytest.raises(FusionError, match="NaN or infinite values: load or render"):
        encoding.fused(fusions.combiner(), fusions.vision(), broken, fusions.poses())
    with pytest.raises(FusionError, match="NaN or infinite values"):
        encoding.hidden_states(fusions.vision().encode_image(broken, crop=False))


def dino(side):
    """A small DINOv2 whose own pictures have `side` pixels."""
    config = {
        "model_type": "dinov2", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "patch_size": 14,
        "image_size": side, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    encoder = comfy.clip_vision.ClipVisionModel(config)
    with torch.inference_mode(False):
        for parameter in encoder.model.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=fusions.generator(1)).to(parameter.dtype)
    return encoder


def test_dinov2_reads_512_pixels_as_published():
    """36 patches of 14 pixels a side, and the class token; the positions are interpolated as transformers does it."""
    encoder, picture = dino(518), fusions.pictures(1, 64, 48)
    states = encoding.states(encoder, picture)
    assert states.shape == (1, 1297, 16) and encoder.image_size == 518
    (output,) = nodes.UnderstudyEncodeAppearance.execute(encoder, picture).result
    assert torch.equal(encoding.hidden_states(output), states)
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14, mlp_ratio=4,
    ))
    names = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
             "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    weights = {key: value.float() for key, value in encoder.get_sd().items()}
    for ours, name in names.items():
        weights = {key.replace(ours, name): value for key, value in weights.items()}
    theirs.load_state_dict(weights)
    x = torch.nn.functional.interpolate(picture.movedim(-1, 1), (512, 512), mode="bicubic", antialias=True)
    x = ((255 * x).clamp(0, 255).round() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = theirs.eval()(x).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-2, atol=3e-2)  # ComfyUI shifts positions by 0.1 of a patch


def test_smaller_dinov2_and_other_encoders_read_their_own_size():
    assert encoding.states(dino(56), fusions.pictures(1, 64, 48)).shape == (1, 17, 16)
    assert encoding.states(fusions.vision(), fusions.pictures()).shape[1] == encoding.hidden_states(
        fusions.vision().encode_image(fusions.pictures(), crop=False)
    ).shape[1]


def test_dinov2_at_its_own_size_is_told_on_apply(caplog):
    model = fusions.model()
    fusion = fusions.fusion(model, unet=None, unet_kind="")
    for tokens, told in ((1370, True), (1297, False)):
        caplog.clear()
        output = types.SimpleNamespace(last_hidden_state=fusions.states(tokens=tokens))
        embed = method.FusionEmbedding(fusions.fused(), weights_fingerprint(fusion.combiner))
        nodes.UnderstudyApplyFusion.execute(model, fusion, output, fusions.poses(), 1.0, embed)
        assert ("connect Encode Appearance" in caplog.text) == told
