"""The masks that a model's own attention gives the blend: where the subject is, in UNets and in Wan."""

from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.modules.attention
import folder_paths
import numpy as np
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from pack.nodes.identity_prior import attention, sampling
from pack.nodes.identity_prior.config import BlendConfig, MaskConfig
from pack.nodes.identity_prior.nodes import UnderstudyEditMasks
from PIL import Image
from support import tiny_model
from support.identity_edits import (
    COLUMNS,
    EDIT,
    INVERSIONS,
    MODEL,
    SHAPE,
    blended,
    inverted,
    latent,
    recorded_inputs,
    sample,
)
from support.real_configurations import build


def attention_by_hand(model, x, sigma, context):
    """The mean share of the subject's tokens in each cell, by torch hooks on the model's own projections."""
    network = model.model.diffusion_model
    modules = [block.attn2 for block in network.modules()
               if isinstance(block, comfy.ldm.modules.attention.BasicTransformerBlock)]
    seen = {}
    handles = [
        projection.register_forward_hook(lambda _m, _i, out, key=(n, name): seen.__setitem__(key, out))
        for n, module in enumerate(modules) for name, projection in (("q", module.to_q), ("k", module.to_k))
    ]
    with torch.inference_mode():
        model.model.apply_model(x, sigma, c_crossattn=context, transformer_options={"cond_or_uncond": [0]})
    for handle in handles:
        handle.remove()
    maps = []
    for n, module in enumerate(modules):
        q, k = (seen[n, name].unflatten(-1, (module.heads, -1)).transpose(1, 2).double() for name in "qk")
        share = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)[..., list(COLUMNS)].sum(-1).mean(1)
        maps.append(share.unflatten(1, (8, 8)))
    return torch.stack(maps).mean(0), len(modules)


def heats_of(model, patched, monkeypatch, **options):
    """The map of every call in a run."""
    heats = []
    original = attention.AttentionRecorder.heat

    def heat(recorder, *earlier):
        heats.append(original(recorder, *earlier))
        return heats[-1]

    monkeypatch.setattr(attention.AttentionRecorder, "heat", heat)
    sample(patched, base=model, **options)
    return heats


def test_found_masks_of_everything_are_plain_sampling_too():
    """Threshold 0: the whole recording runs, and changes no bit, wherever the source's subject was."""
    assert INVERSIONS[id(MODEL)].source_mask.mean() < 1
    assert torch.equal(sample(blended(threshold=0.0, grow=0)), sample(MODEL))


def test_the_map_is_the_subject_s_share_of_the_positive_half_alone(monkeypatch):
    patched = blended(threshold=0.0)
    heats = heats_of(MODEL, patched, monkeypatch)
    calls = recorded_inputs(MODEL, blended(threshold=0.0), "euler")
    assert len(calls) == 6
    for heat, (sigma, x) in zip(heats, calls, strict=False):
        expected, count = attention_by_hand(MODEL, x, torch.tensor([sigma]), EDIT[0][0])
        torch.testing.assert_close(heat[:, 0].double(), expected, rtol=1e-3, atol=1e-5)
    assert count == len(attention.layers_of(MODEL)) == 4


def test_prompts_of_different_lengths_are_repeated_by_comfyui(monkeypatch):
    """CFG with 4 and 8 tokens: the positive's tokens are repeated."""
    heats = heats_of(MODEL, blended(threshold=0.0), monkeypatch)
    original = tiny_model.conditioning
    monkeypatch.setattr(tiny_model, "conditioning", lambda seed, tokens=4: original(seed, 8 if seed == 2 else tokens))
    longer = heats_of(MODEL, blended(threshold=0.0), monkeypatch)
    torch.testing.assert_close(longer[0], heats[0], rtol=1e-4, atol=1e-6)


def test_masks_join_the_source_and_the_edit_and_are_shown():
    patched = blended(grow=0, threshold=0.8)
    result = sample(patched)
    run = sampling.masks_of(patched, result)
    source, edited = run
    joined = torch.maximum(source, edited)
    assert 0 < joined.mean() < 1 and not torch.equal(source, edited)
    outside = (joined[:, 0] == 0).unsqueeze(1).expand_as(result)
    torch.testing.assert_close(result[outside], latent()["samples"][outside], rtol=1e-4, atol=1e-5)
    assert (result - latent()["samples"])[~outside].abs().mean() > 0.01
    left = ((source == 1) & (edited == 0)).expand_as(result)
    assert left.any() and (result - latent()["samples"])[left].abs().mean() > 0.01, "where only the source had it"
    masks = UnderstudyEditMasks.execute(patched, {"samples": result})
    shown_source, shown_edited = masks.result
    assert shown_source.shape == (1, 64, 64) and torch.equal(shown_source[:, ::8, ::8], source[:, 0])
    assert torch.equal(shown_edited[:, 4::8, 4::8], edited[:, 0])
    (picture,) = masks.ui["images"]
    with Image.open(Path(folder_paths.get_temp_directory()) / picture["subfolder"] / picture["filename"]) as opened:
        assert opened.size == (64 + 8 + 64, 64) and opened.getpixel((67, 0)) == (127, 127, 127)
        for left, mask in ((0, shown_source), (64 + 8, shown_edited)):
            shown = np.array(opened)[:, left : left + 64]
            assert (shown == 255 * mask[0, :, :, None].numpy()).all()


def test_masks_belong_to_the_samples_that_they_made(caplog):
    patched = blended(threshold=0.7)
    results = [sample(patched, seed=3)]
    sampling.masks_of(patched, results[0] * 2)  # after a single run it is clear which masks
    results.append(sample(patched, seed=4))
    first, second = (sampling.masks_of(patched, result)[1] for result in results)
    assert not torch.equal(first, second)
    # What was changed meanwhile shows the last run's.
    assert "last run's" not in caplog.text
    assert torch.equal(sampling.masks_of(patched, results[0] * 2)[1], second)
    assert "shows the last run's" in caplog.text
    with pytest.raises(ValueError, match="has not been used by a sampler"):
        sampling.masks_of(blended(), results[0])
    with pytest.raises(ValueError, match="no blend"):
        sampling.masks_of(MODEL, results[0])


def test_patches_leave_the_model_and_each_other_alone():
    options = MODEL.model_options["transformer_options"]
    before = dict(options)
    patched = blended()
    again = blended(patched, inversion=INVERSIONS[id(MODEL)], mask=None)
    assert MODEL.model_options["transformer_options"] == before
    first = sample(patched)
    assert torch.equal(sample(again), first) and torch.equal(sample(patched.clone()), first)
    places = again.model_options["transformer_options"]["patches_replace"]["attn2"].values()
    assert len(places) == 4 and all(patch.earlier is None for patch in places)
    assert torch.equal(sample(MODEL), sample(attention.with_recorder(MODEL)))


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_steps_in_which_a_cache_skips_the_model_keep_the_mask(node):
    cached = node.execute(MODEL, 100.0, 0.0, 1.0, False).result[0]
    assert torch.isfinite(inverted(cached).trajectory.latents).all()
    inversion = INVERSIONS[id(MODEL)]
    plain = sample(cached, inversion=inversion)
    assert not torch.equal(plain, sample(MODEL))
    patched = blended(cached, inversion=inversion, grow=0, threshold=0.8)
    result = sample(patched, inversion=inversion)
    joined = torch.maximum(*sampling.masks_of(patched, result)).expand_as(result)
    assert 0 < joined.mean() < 1
    torch.testing.assert_close(result[joined == 0], latent()["samples"][joined == 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(sample(blended(cached, inversion=inversion, threshold=0.0), inversion=inversion), plain)


def test_a_blended_model_is_not_inverted_with():
    with pytest.raises(ValueError, match="connect the model from before Identity Mask Blend"):
        inverted(blended())


def test_an_earlier_cross_attention_patch_keeps_working():
    seen = []

    def earlier(q, k, v, options):
        seen.append(options["block"])
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"]) * 0.5

    model = MODEL.clone()
    model.set_model_attn2_replace(earlier, "middle", 0)
    inversion = inverted(model)
    seen.clear()
    plain = sample(model, inversion=inversion)
    count = len(seen)
    assert torch.equal(sample(blended(model, inversion=inversion, threshold=0.0), inversion=inversion), plain)
    assert count and len(seen) == 2 * count


@pytest.mark.parametrize("layers", ["0", "1-2", "all", "auto"])
def test_layers_and_resolution_are_chosen(layers):
    assert torch.isfinite(sample(blended(layers=layers, resolution=5, smoothing=0.0))).all()


def test_what_cannot_show_the_subject_is_refused():
    for settings, words in (({"layers": "9"}, "0 to 3"), ({"layers": "x"}, "layers is 'x'")):
        with pytest.raises(ValueError, match=words):
            blended(**settings)
    with pytest.raises(ValueError, match="connect Encode Identity to `positive`"):
        blended(positive=tiny_model.conditioning(1))
    with pytest.raises(ValueError, match="sampler's positive does not say"):
        sample(blended(), positive=tiny_model.conditioning(1))
    wan = tiny_model.wan()
    with pytest.raises(ValueError, match="invert with this model"):
        sampling.apply(wan, INVERSIONS[id(MODEL)], EDIT, MaskConfig(), BlendConfig(), None)


def test_context_windows_and_models_without_cross_attention_need_a_mask(monkeypatch):
    recorder = attention.AttentionRecorder({}, attention.layers_of(MODEL), MaskConfig(), torch.Size(SHAPE))
    q = torch.zeros(1, 64, 32)
    with pytest.raises(ValueError, match="context windows.*your own `mask`"):
        recorder.record(0, q, q, 2, {"context_window": object(), "uuids": []})
    with pytest.raises(ValueError, match="has 63 positions where the latent has"):
        recorder.entries = {"a": (COLUMNS, 4)}
        recorder.record(0, q[:, :63], q[:, :4], 2, {"uuids": ["a"]})
    with pytest.raises(ValueError, match="looks at 6 tokens and the prompt has 4"):
        recorder.record(0, q, q[:, :6], 2, {"uuids": ["a"]})
    monkeypatch.setattr(attention, "layers_of", lambda model: ())
    inversion = inverted(MODEL, positive=tiny_model.conditioning(1))
    assert inversion.source_mask.all()
    with pytest.raises(ValueError, match="no cross-attention.*your own `mask`"):
        blended(inversion=inversion)
    result = sample(blended(mask=torch.zeros(1, 8, 8), inversion=inversion), inversion=inversion)
    torch.testing.assert_close(result, latent()["samples"], rtol=1e-4, atol=1e-5)


def test_wan_shows_the_subject_in_its_cross_attention(monkeypatch):
    """Text comes second in a block's attentions, and third where a picture's features are before it."""
    for kind, use in (("t2v", 1), ("i2v", 2)):
        wan = tiny_model.wan(kind)
        patches = attention.with_recorder(wan).model_options["transformer_options"]["patches_replace"]["dit"]
        assert {patch.use for patch in patches.values()} == {use}
    wan = tiny_model.wan()
    shape = (1, 16, 3, 8, 6)
    clip = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    inversion = inverted(wan, source=clip, steps=3, iterations=2)
    network = wan.model.diffusion_model
    seen = []
    cross = network.blocks[1].cross_attn
    handles = [
        module.register_forward_hook(lambda _m, _i, out: seen.append(out))
        for module in (cross.norm_q, cross.norm_k)
    ]
    # The middle third of three blocks is the second alone.
    patched = blended(wan, inversion=inversion, threshold=0.0)
    options = {"shape": shape, "cfg": 1.0, "inversion": inversion}
    heats = heats_of(wan, patched, monkeypatch, **options)
    for handle in handles:
        handle.remove()
    q, k = (rows.unflatten(-1, (network.num_heads, -1)).transpose(1, 2).double() for rows in seen[:2])
    share = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)[..., list(COLUMNS)].sum(-1).mean(1)
    torch.testing.assert_close(heats[0].flatten(1).double(), share, rtol=1e-3, atol=1e-5)
    assert heats[0].shape == (1, 3, 4, 3)
    assert torch.equal(sample(patched, **options), sample(wan, **options))
    pair = {**options, "shape": (2, *shape[1:])}
    shown = UnderstudyEditMasks.execute(patched, {"samples": sample(patched, **pair)}).result
    assert [mask.shape for mask in shown] == [(6, 64, 48)] * 2, "one source for a batch of clips"
    masks = torch.zeros(9, 16, 16)
    masks[:5] = 1
    edit = sample(blended(wan, masks, inversion=inversion), **options)
    torch.testing.assert_close(edit[:, :, 2], clip["samples"][:, :, 2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(edit[:, :, 0], clip["samples"][:, :, 0], atol=0.01)
    with pytest.raises(ValueError, match="mask has 4 frames"):
        blended(wan, masks[:4], inversion=inversion)


# The layers of real models: their shapes alone, on the meta device

# Latent cells of each layer's cells, written down from the published models: three levels down and up again.
FOUR_LEVELS = [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
FACTORS = {
    "SD 1.5": FOUR_LEVELS, "SD 2.1": FOUR_LEVELS, "SDXL": [2] * 4 + [4] * 60 + [2] * 6,
    "Wan 2.1 1.3B": [2] * 30, "Wan 2.1 14B": [2] * 40,
}
# The longer side of latents of 512, 768, 1024, 256 and 832 pixels.
AUTO = [
    ("SD 1.5", 64, {4, 5, 7, 8, 9}), ("SD 2.1", 96, {4, 5, 7, 8, 9}), ("SD 1.5", 128, {4, 5, 7, 8, 9}),
    ("SDXL", 128, {4, 19, 34, 48, 63}), ("SD 1.5", 32, {2, 3, 10, 11, 12}),
    ("Wan 2.1 1.3B", 104, {10, 12, 14, 17, 19}), ("Wan 2.1 14B", 104, {13, 16, 19, 23, 26}),
]


def layers_of_real(name):
    network = build(name).diffusion_model
    return attention.layers_of(SimpleNamespace(get_model_object=lambda _key: network))


@pytest.mark.parametrize("name", FACTORS)
def test_every_cross_attention_is_known_with_its_cells(name):
    layers = layers_of_real(name)
    assert [layer.factor for layer in layers] == FACTORS[name]
    assert len({layer.place for layer in layers}) == len(layers)
    if name.startswith("SD"):
        assert layers[0].place == ("input", 4 if name == "SDXL" else 1, 0)
        assert layers[-1].place == ("output", 5 if name == "SDXL" else 11, 1 if name == "SDXL" else 0)


@pytest.mark.parametrize(("name", "side", "expected"), AUTO)
def test_auto_takes_five_layers_of_the_coarsest_or_in_the_middle(name, side, expected):
    layers = layers_of_real(name)
    assert attention.chosen_layers(layers, MaskConfig(), side) == expected
    assert len(attention.chosen_layers(layers, MaskConfig(layers="all"), side)) == len(layers)
    assert attention.chosen_layers(layers, MaskConfig(layers="0-2"), side) == {0, 1, 2}
