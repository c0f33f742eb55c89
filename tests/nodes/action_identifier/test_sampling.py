"""Contexts in real sampling runs, against models whose layers are handed other prompts directly."""

import logging

import pytest
import torch
from pack.nodes.action_identifier import sampling
from pack.nodes.action_identifier.method import ActionError, ActionIdentifier
from support import action_identifiers, tiny_clip, tiny_model
from support.action_runs import (
    MODEL,
    NEGATIVE,
    close,
    contexts_of,
    denoised,
    estimate,
    far,
    forced,
    passes,
    plain,
    prompt,
    sample,
)
from support.real_configurations import build


def test_the_map_of_layers_comes_from_the_network():
    counts = {"SD 1.5": (16, 16), "SD 2.1": (16, 16), "SDXL": (11, 70), "Wan 2.1 1.3B": (30, 30),
              "Wan 2.1 14B": (40, 40)}
    for name, expected in counts.items():
        actual = sampling.places(build(name).diffusion_model)
        assert (len(actual), sum(place.layers for place in actual)) == expected, name
    sd = sampling.places(build("SD 1.5").diffusion_model)
    assert [place.index for place in sd] == [1, 2, 4, 5, 7, 8, 0, *range(3, 12)]
    assert [place.kind for place in sd] == ["input"] * 6 + ["middle"] + ["output"] * 9
    with pytest.raises(ValueError, match="is a Linear, and action identifiers need"):
        sampling.places(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is a CausalWanModel, and action identifiers need"):
        sampling.places(tiny_model.wan("causal").model.diffusion_model)


def test_each_layer_reads_its_own_context():
    """At CFG 1 the positive runs alone, and hooks on the layers give the same picture without a patch."""
    attached = prompt()
    actual = sample(sampling.apply(MODEL, 1.0), attached, cfg=1.0)
    with forced(MODEL, contexts_of(attached)):
        expected = sample(MODEL, plain(), cfg=1.0)
    close(actual, expected)
    far(actual, sample(MODEL, plain(), cfg=1.0))


def test_sdxl_s_groups_of_layers_and_both_encoders():
    model, clip = action_identifiers.reading(tiny_model.xl()), tiny_clip.clip("SDXL")
    assert [place.layers for place in action_identifiers.places(model)] == [2, 2, 2, 2]
    action = action_identifiers.identifier(model, "SDXL")
    attached = prompt(actions=[action], clip=clip)
    negative = action_identifiers.plain(clip, "")

    def run(model, positive):
        return sample(model, positive, negative=negative, cfg=1.0)

    actual = run(sampling.apply(model, 1.0), attached)
    with forced(model, contexts_of(attached)):
        expected = run(model, plain(clip=clip))
    close(actual, expected)
    assert torch.equal(run(sampling.apply(model, 0.0), attached), run(model, plain(clip=clip)))
    for encoder in ("l", "g"):
        other = {**action.tokens, encoder: action.tokens[encoder].roll(1, 0)}
        changed = prompt(actions=[ActionIdentifier("<action>", "dancing", other, action.places)], clip=clip)
        far(run(sampling.apply(model, 1.0), changed), actual)


def test_a_plain_negative_runs_in_the_same_pass_and_is_read_plainly():
    attached = prompt()
    with passes(MODEL) as sizes:
        actual = sample(sampling.apply(MODEL, 1.0), attached, cfg=3.0)
    assert sizes == [2, 2]
    alone = {}
    for name, positive in (("action", attached), ("plain", NEGATIVE)):
        alone[name] = denoised(sampling.apply(MODEL, 1.0), positive)
    one = sample(sampling.apply(MODEL, 1.0), attached, cfg=3.0, sigmas=torch.tensor([5.0, 0.0]))
    expected = alone["plain"] + 3.0 * (alone["action"] - alone["plain"])
    close(one, expected)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_strength_0_is_the_prompt_with_the_initial_word_bit_for_bit(cfg):
    assert torch.equal(sample(sampling.apply(MODEL, 0.0), prompt(), cfg=cfg), sample(MODEL, plain(), cfg=cfg))


def test_an_action_that_makes_the_prompt_longer_has_nothing_between_word_and_action():
    """With its three tokens the prompt needs a second part of 75, with the word it does not."""
    action = action_identifiers.identifier(MODEL, count=3)
    text = "cat " * 74 + "<action>"
    attached = prompt(text, [action])
    assert (attached[0][0].shape[1], contexts_of(attached).shape[1]) == (77, 154)
    word = plain(text.replace("<action>", "dancing"))
    assert torch.equal(sample(sampling.apply(MODEL, 0.0), attached), sample(MODEL, word))
    actual = sample(sampling.apply(MODEL, 1.0), attached, cfg=1.0)
    with forced(MODEL, contexts_of(attached)):
        expected = sample(MODEL, [[torch.cat([word[0][0]] * 2, 1), word[0][1]]], cfg=1.0)
    close(actual, expected)
    with passes(MODEL) as sizes:
        assert torch.isfinite(sample(sampling.apply(MODEL, 1.0), attached, cfg=2.0)).all()
    assert sizes == [2, 2]
    with pytest.raises(ActionError, match="set strength to 0 or 1"):
        sample(sampling.apply(MODEL, 0.5), attached)


def test_a_patched_model_reads_plain_prompts_bit_for_bit_as_before():
    assert torch.equal(sample(sampling.apply(MODEL, 1.0), plain()), sample(MODEL, plain()))


def test_strength_is_the_way_from_the_word_to_the_action():
    attached = prompt()
    word, contexts = attached[0][0], contexts_of(attached)
    for strength in (0.3, 2.0):
        with forced(MODEL, word + strength * (contexts - word)):
            expected = sample(MODEL, plain(), cfg=1.0)
        close(
            sample(sampling.apply(MODEL, strength), attached, cfg=1.0), expected
        )
    twice = sampling.apply(sampling.apply(MODEL, 0.2), 1.0)
    assert torch.equal(sample(twice, attached), sample(sampling.apply(MODEL, 1.0), attached)), "the last one counts"


def test_without_apply_the_run_stops_and_says_what_to_connect():
    for positive in (prompt(), plain() + prompt()):
        with passes(MODEL) as sizes, pytest.raises(ValueError, match="<action>.*connect Apply Action Identifier"):
            sample(MODEL, positive)
        assert sizes == []
    assert torch.isfinite(sample(MODEL, plain())).all()


def test_the_callers_model_and_prompt_stay_as_they_are():
    attached = prompt()
    before = dict(attached[0][1]["model_conds"])
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.model_options.items()}
    patched = sampling.apply(sampling.apply(MODEL, 1.0), 0.5)
    sample(patched, attached)
    assert MODEL.model_options == options and not MODEL.wrappers
    assert attached[0][1]["model_conds"] == before
    assert len(patched.model_options["transformer_options"]["patches"]["attn2_patch"]) == 1
    assert [len(entries) for kind in patched.wrappers.values() for entries in kind.values()] == [1, 1]
    clone = patched.clone()
    assert torch.equal(sample(clone, attached), sample(patched, attached))


def test_batches_of_latents_and_16_bit_models():
    attached = prompt()
    shape = (3, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    together = sample(sampling.apply(MODEL, 1.0), attached, shape=shape)
    assert noise.shape == together.shape and not torch.equal(together[0], together[1])
    low = action_identifiers.reading(tiny_model.picture(dtype=torch.bfloat16))
    actual = denoised(sampling.apply(low, 1.0), attached)
    torch.testing.assert_close(actual, estimate(attached), rtol=0.1, atol=0.1 * float(actual.std()))


def test_an_identifier_of_another_model_is_refused_before_a_pass():
    larger = action_identifiers.identifier(tiny_model.xl())
    attached = prompt(actions=[larger])
    with passes(MODEL) as sizes, pytest.raises(
        ActionError,
        match="another kind of model, with 8 cross-attention layers .* this one has 4 .* is input 3, here input 1",
    ):
        sample(sampling.apply(MODEL, 1.0), attached)
    assert sizes == []


def test_other_weights_warn_once_and_never_stop(caplog):
    base = sampling.apply(MODEL, 1.0).get_attachment(sampling.KEY).base
    matching, other = (action_identifiers.identifier(MODEL, base=name) for name in (base, "0123456789abcdef"))
    with caplog.at_level(logging.WARNING):
        sample(sampling.apply(MODEL, 1.0), prompt(actions=[matching]))
        assert "trained with other weights" not in caplog.text
        sample(sampling.apply(MODEL, 1.0), prompt(actions=[other]), steps=3)
        patched = sampling.apply(MODEL, 1.0)
        for name in ("0123456789abcdef", "0123456789abcdef", "fedcba9876543210"):
            sample(patched, prompt(actions=[action_identifiers.identifier(MODEL, base=name)]), steps=1)
    assert caplog.text.count("trained with other weights") == 1 + 2, "once for each file under one placeholder"
    assert sampling.fingerprint(tiny_model.picture()) != base


def test_a_lora_on_the_model_is_still_the_same_model():
    patched = MODEL.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    weight = MODEL.model.state_dict()[key]
    patched.add_patches({key: ("diff", (torch.ones_like(weight),))})
    before = sampling.fingerprint(patched)
    sample(patched, plain(), steps=1)
    assert sampling.fingerprint(patched) == before == sampling.fingerprint(MODEL)
    patched.unpatch_model()


class Doubling:
    """As a hypernetwork is for ComfyUI: a patch that changes keys and values, each in another way."""

    def __call__(self, n, context, value, _extra_options):
        return n, 2 * context, 3 * value


def test_a_patch_of_keys_and_values_acts_on_the_action_before_apply_and_after():
    attached, earlier = prompt(), MODEL.clone()
    earlier.set_model_attn2_patch(Doubling())
    later = sampling.apply(MODEL, 1.0)
    later.set_model_attn2_patch(Doubling())
    for positive in (attached, plain()):
        actual = sample(sampling.apply(earlier, 1.0), positive)
        assert torch.equal(actual, sample(later, positive))
        far(actual, sample(sampling.apply(MODEL, 1.0), positive))
    assert torch.equal(sample(sampling.apply(earlier, 1.0), plain()), sample(earlier, plain()))


def test_wan_blocks_read_their_own_context():
    model = tiny_model.wan()
    action = action_identifiers.identifier(model)
    attached = prompt(actions=[action])
    shape = (1, 16, 1, 4, 4)
    contexts = contexts_of(attached)
    network = model.model.diffusion_model
    handles = [
        block.cross_attn.register_forward_pre_hook(
            lambda _m, args, i=i: (args[0], network.text_embedding(contexts[i : i + 1].to(args[1])))
        )
        for i, block in enumerate(network.blocks)
    ]
    expected = sample(model, plain(), cfg=1.0, shape=shape)
    for handle in handles:
        handle.remove()
    actual = sample(sampling.apply(model, 1.0), attached, cfg=1.0, shape=shape)
    close(actual, expected)
    far(actual, sample(model, plain(), cfg=1.0, shape=shape))
    assert torch.equal(
        sample(sampling.apply(model, 0.0), attached, shape=shape), sample(model, plain(), shape=shape)
    )


def test_prompts_of_unequal_lengths_are_repeated_and_what_is_before_them_stays():
    contexts = sampling.BatchContexts((None, torch.randn(4, 6, 8)), (2, 1), length=4)
    context = torch.randn(3, 3 + 4, 8)
    read = contexts.at(2, context)
    assert read.shape == (3, 3 + 12, 8) and torch.equal(read[:, :3], context[:, :3])
    assert torch.equal(read[:2, 3:], context[:2, 3:].repeat(1, 3, 1))
    assert torch.equal(read[2, 3:], contexts.contexts[1][2].repeat(2, 1))
