"""Relatives of Wan: those whose attention the reference joins, and those that are refused by name."""


import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from pack.nodes.patching import models, wan_blocks
from pack.nodes.video_identity import method, sampling
from support import published_wan, tiny_model
from support.video_identities import (
    SHAPE,
    cached_kv,
    call,
    draw,
    person,
    picture_latent,
    relative,
    sample,
    shown,
    weighed,
)

X = draw(2, *SHAPE)
SCAIL = {  # two reference pictures, and a pose at half the size
    "c_concat": draw(5, 1, 4, 3, 8, 6), "clip_fea": draw(6, 1, 257, 1280),
    "reference_latent": draw(8, 1, 20, 2, 8, 6), "pose_latents": draw(7, 1, 20, 3, 4, 4),
}
# The inputs of each relative besides the latent, and the number of tokens before and after those of the video.
RELATIVES = {
    "t2v": ("t2v", {}, 0, 0),
    "i2v": ("i2v", {"c_concat": draw(5, 1, 20, 3, 8, 6), "clip_fea": draw(6, 1, 257, 1280)}, 0, 0),
    "fun control": ("fun", {"reference_latent": draw(5, 1, 16, 8, 6)}, 12, 0),
    "camera": ("camera", {"c_concat": draw(5, 1, 16, 3, 8, 6)}, 0, 0),
    "vace": ("vace", {"vace_context": draw(5, 1, 1, 96, 3, 8, 6), "vace_strength": [0.8]}, 0, 0),
    "phantom": ("t2v", {"time_dim_concat": draw(5, 1, 16, 2, 8, 6)}, 0, 24),
    "bernini": ("t2v", {"context_latents": [draw(5, 1, 16, 1, 8, 6), draw(6, 1, 16, 1, 4, 4)]}, 0, 16),
    "wan 2.2 5B": ("wan2.2 5B", {}, 0, 0),
    "humo": ("humo", {"audio_embed": draw(7, 1, 3, 8, 5, 1280), "reference_latent": draw(5, 1, 16, 1, 8, 6)}, 0, 12),
    "animate": ("animate", {
        "c_concat": draw(5, 1, 20, 3, 8, 6), "clip_fea": draw(6, 1, 257, 1280),
        "pose_latents": draw(8, 1, 16, 2, 8, 6), "face_pixel_values": draw(7, 1, 3, 5, 16, 16),
    }, 0, 0),
    "scail": ("scail", SCAIL, 24, 12), "scail 2": ("scail 2", SCAIL, 24, 12),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_every_relative_sees_the_published_keys_and_values(name):
    """Keys and values against the published formulas on its own weights; attention against the definition."""
    kind, conditions, leading, trailing = RELATIVES[name]
    # Animate has an attention to faces after every fifth block.
    model = tiny_model.wan(kind, num_layers=5 if kind == "animate" else 2)
    if kind == "animate":  # its encoder reads faces of 512 pixels alone, which takes long here
        model.model.diffusion_model.motion_encoder.get_motion = lambda faces: faces.flatten(1)[:, :512]
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    channels = model.model.latent_format.latent_channels
    x, latent = draw(2, 1, channels, 3, 8, 6), picture_latent(1, channels=channels)
    one = person(adapter=adapter, latent=latent)
    patched = shown(model, one)
    result = call(patched, x, cleanup=False, **conditions)
    cache = models.attachment(patched, sampling.KEY).cache
    kv = cached_kv(cache)
    cache.clear()

    network = model.model.diffusion_model
    inputs = network.patch_embedding.weight.shape[1]
    wan = published_wan.Wan(network.state_dict(), 2, 32, adapter.tensors())
    image = torch.zeros(1, inputs, 1, 6, 4)
    image[:, :channels] = model.model.process_latent_in(latent.clone())
    wan(torch.zeros(1, inputs, 1, 8, 6), torch.tensor([700.0]), draw(9, 1, 4, tiny_model.CONTEXT), image)
    for i, expected in enumerate(wan.attended):
        for ours, theirs in zip(kv[i], expected, strict=True):
            assert relative(ours.flatten(2), theirs) < 1e-5

    tokens = 36 + leading + trailing
    assert relative(result, weighed(x, [torch.ones(tokens)], [one], model, **conditions)) < 1e-5
    assert relative(result, call(model, x, **conditions)) > 1e-3
    mask = torch.zeros(3, 16, 12)
    mask[0] = 1
    masked = person(adapter=adapter, latent=latent, mask=mask, strength=0.9)
    third = [torch.full((count,), 1 / 3) for count in (leading, trailing)]
    weights = 0.9 * torch.cat([third[0], torch.ones(12), torch.zeros(24), third[1]])
    masked_result = call(shown(model, masked), x, **conditions)
    assert relative(masked_result, weighed(x, [weights], [one], model, **conditions)) < 1e-5


@pytest.mark.parametrize("kind", ["i2v", "fun", "camera", "wan2.2 5B", "humo", "scail", "scail 2"])
def test_relatives_sample(kind):
    model = tiny_model.wan(kind, num_layers=1)
    channels = model.model.latent_format.latent_channels
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    shape = (1, channels, 2, 4, 6)
    patched = shown(model, person(adapter=adapter, latent=picture_latent(1, channels=channels)))
    result = sample(patched, shape=shape)
    assert torch.isfinite(result).all() and not torch.equal(result, sample(model, shape=shape))
    assert torch.equal(sample(patched, shape=shape), result)


@pytest.mark.parametrize(("kind", "name"), [("s2v", "WanModel_S2V"), ("wandancer", "WanDancerModel")])
def test_a_relative_that_is_not_verified_is_refused_by_name(kind, name):
    model = tiny_model.wan(kind, num_layers=1)
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    with pytest.raises(ValueError, match=f"a {name}, a relative of Wan .* not verified: connect a Wan T2V"):
        shown(model, person(adapter=adapter))


def test_blocks_that_attend_to_the_video_in_parts_are_refused():
    """WanAnimate2Model's, on newer versions of ComfyUI: a reference would act in one of the parts."""
    class WanAnimate2Block(comfy.ldm.wan.model.WanAttentionBlock):
        pass

    model = tiny_model.wan(num_layers=1)
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    network = model.model.diffusion_model
    network.blocks[0].__class__ = WanAnimate2Block
    network.__class__ = type("WanAnimate2Model", (type(network),), {})
    with pytest.raises(ValueError, match="a WanAnimate2Model, which does not let its attention be extended"):
        shown(model, person(adapter=adapter))
    assert wan_blocks.cross_attentions(network) == ()


def test_animate_s_reference_picture_is_no_frame_of_the_user_s_video():
    model = tiny_model.wan("animate", num_layers=5)
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    conditions, x = {"c_concat": draw(5, 1, 20, 3, 8, 6)}, draw(2, *SHAPE)
    ones = shown(model, person(adapter=adapter, mask=torch.ones(5, 16, 12)))
    assert torch.equal(call(ones, x, **conditions), call(shown(model, person(adapter=adapter)), x, **conditions))
