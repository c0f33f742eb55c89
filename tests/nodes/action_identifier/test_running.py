"""Contexts in real sampling runs, against models whose own layers are given other prompts."""

import contextlib
import logging

import action_identifiers
import comfy.samplers
import pytest
import tiny_clip
import tiny_model
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from pack.nodes.action_identifier import layers, running
from pack.nodes.action_identifier.method import ActionError, ActionIdentifier, BatchContexts, Rows, blended
from real_configurations import build

import nodes as host

CLIP = tiny_clip.clip()
MODEL = action_identifiers.reading(tiny_model.picture())
ACTION = action_identifiers.identifier(MODEL)
NEGATIVE = action_identifiers.plain(CLIP, "")
EULER = comfy.samplers.sampler_object("euler")


def prompt(text=action_identifiers.TEXT, actions=(ACTION,), clip=CLIP):
    return action_identifiers.prompt(clip, list(actions), text)


def plain(text="a cat dancing on a beach", clip=CLIP):
    return action_identifiers.plain(clip, text)


def sample(model, positive, **options):
    options = {"steps": 2, "negative": NEGATIVE, **options}
    return tiny_model.sample(model, EULER, positive=positive, **options)


def close(found, expected):
    """Pictures of deviations of 10 and more, whose batches of other sizes round differently."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)


def far(found, other):
    """More than rounding and tolerance."""
    assert (found - other).abs().max() > 0.05 * other.std()


def contexts_of(conditioning):
    return conditioning[0][1]["model_conds"][running.KEY].contexts


@contextlib.contextmanager
def forced(model, contexts, rows=slice(None)):
    """Each cross-attention of the network reads what is given for it, in the order of the network's modules."""
    layer = -1
    handles = []

    def reads(number):
        def hook(_module, args, kwargs):
            context = kwargs["context"].clone()
            context[rows] = contexts[number].to(context)
            return args, {**kwargs, "context": context}

        return hook

    for _, module in model.model.diffusion_model.named_modules():
        if hasattr(module, "transformer_blocks"):
            layer += 1
            for block in module.transformer_blocks:
                handles.append(block.attn2.register_forward_pre_hook(reads(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_the_map_of_layers_comes_from_the_network():
    counts = {"SD 1.5": (16, 16), "SD 2.1": (16, 16), "SDXL": (11, 70), "Wan 2.1 1.3B": (30, 30),
              "Wan 2.1 14B": (40, 40)}
    for name, expected in counts.items():
        found = layers.places(build(name).diffusion_model)
        assert (len(found), sum(place.layers for place in found)) == expected, name
    sd = layers.places(build("SD 1.5").diffusion_model)
    assert [place.index for place in sd] == [1, 2, 4, 5, 7, 8, 0, *range(3, 12)]
    assert [place.kind for place in sd] == ["input"] * 6 + ["middle"] + ["output"] * 9
    with pytest.raises(ValueError, match="is a Linear, and action identifiers need"):
        layers.places(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is a CausalWanModel, and action identifiers need"):
        layers.places(tiny_model.wan("causal").model.diffusion_model)


def test_each_layer_reads_its_own_context():
    """At CFG 1 the positive runs alone, and hooks on the layers give the same picture without a patch."""
    sealed = prompt()
    found = sample(running.apply(MODEL, 1.0), sealed, cfg=1.0)
    with forced(MODEL, contexts_of(sealed)):
        expected = sample(MODEL, plain(), cfg=1.0)
    close(found, expected)
    far(found, sample(MODEL, plain(), cfg=1.0))


def test_sdxl_s_groups_of_layers_and_both_encoders():
    model, clip = action_identifiers.reading(tiny_model.xl()), tiny_clip.clip("SDXL")
    assert [place.layers for place in action_identifiers.places(model)] == [2, 2, 2, 2]
    action = action_identifiers.identifier(model, "SDXL")
    sealed = prompt(actions=[action], clip=clip)
    negative = action_identifiers.plain(clip, "")

    def run(model, positive):
        return sample(model, positive, negative=negative, cfg=1.0)

    found = run(running.apply(model, 1.0), sealed)
    with forced(model, contexts_of(sealed)):
        expected = run(model, plain(clip=clip))
    close(found, expected)
    assert torch.equal(run(running.apply(model, 0.0), sealed), run(model, plain(clip=clip)))
    for encoder in ("l", "g"):
        other = {**action.tokens, encoder: action.tokens[encoder].roll(1, 0)}
        changed = prompt(actions=[ActionIdentifier("<action>", "dancing", other, action.places)], clip=clip)
        far(run(running.apply(model, 1.0), changed), found)


@contextlib.contextmanager
def passes(model):
    """How many samples each pass of the network has."""
    sizes = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_plain_negative_runs_in_the_same_pass_and_is_read_plainly():
    sealed = prompt()
    with passes(MODEL) as sizes:
        found = sample(running.apply(MODEL, 1.0), sealed, cfg=3.0)
    assert sizes == [2, 2]
    alone = {}
    for name, positive in (("action", sealed), ("plain", NEGATIVE)):
        alone[name] = denoised(running.apply(MODEL, 1.0), positive)
    one = sample(running.apply(MODEL, 1.0), sealed, cfg=3.0, sigmas=torch.tensor([5.0, 0.0]))
    expected = alone["plain"] + 3.0 * (alone["action"] - alone["plain"])
    close(one, expected)
    assert torch.isfinite(found).all()


def denoised(model, positive):
    """One step of Euler to sigma 0 is the estimate itself."""
    return sample(model, positive, cfg=1.0, sigmas=torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_strength_0_is_the_prompt_with_the_initial_word_bit_for_bit(cfg):
    assert torch.equal(sample(running.apply(MODEL, 0.0), prompt(), cfg=cfg), sample(MODEL, plain(), cfg=cfg))


def test_an_action_that_makes_the_prompt_longer_has_nothing_between_word_and_action():
    """With its three tokens the prompt needs a second part of 75, with the word it does not."""
    action = action_identifiers.identifier(MODEL, count=3)
    text = "cat " * 74 + "<action>"
    sealed = prompt(text, [action])
    assert (sealed[0][0].shape[1], contexts_of(sealed).shape[1]) == (77, 154)
    word = plain(text.replace("<action>", "dancing"))
    assert torch.equal(sample(running.apply(MODEL, 0.0), sealed), sample(MODEL, word))
    found = sample(running.apply(MODEL, 1.0), sealed, cfg=1.0)
    with forced(MODEL, contexts_of(sealed)):
        expected = sample(MODEL, [[torch.cat([word[0][0]] * 2, 1), word[0][1]]], cfg=1.0)
    close(found, expected)
    with passes(MODEL) as sizes:
        assert torch.isfinite(sample(running.apply(MODEL, 1.0), sealed, cfg=2.0)).all()
    assert sizes == [2, 2]
    with pytest.raises(ActionError, match="set strength to 0 or 1"):
        sample(running.apply(MODEL, 0.5), sealed)


def test_a_patched_model_reads_plain_prompts_bit_for_bit_as_before():
    assert torch.equal(sample(running.apply(MODEL, 1.0), plain()), sample(MODEL, plain()))


def test_strength_is_the_way_from_the_word_to_the_action():
    sealed = prompt()
    word, learnt = sealed[0][0], contexts_of(sealed)
    for strength in (0.3, 2.0):
        with forced(MODEL, word + strength * (learnt - word)):
            expected = sample(MODEL, plain(), cfg=1.0)
        close(
            sample(running.apply(MODEL, strength), sealed, cfg=1.0), expected
        )
    twice = running.apply(running.apply(MODEL, 0.2), 1.0)
    assert torch.equal(sample(twice, sealed), sample(running.apply(MODEL, 1.0), sealed)), "the last one counts"


def test_without_apply_the_run_stops_and_says_what_to_connect():
    for positive in (prompt(), plain() + prompt()):
        with passes(MODEL) as sizes, pytest.raises(ValueError, match="<action>.*connect Apply Action Identifier"):
            sample(MODEL, positive)
        assert sizes == []
    assert torch.isfinite(sample(MODEL, plain())).all()


def test_the_callers_model_and_prompt_stay_as_they_are():
    sealed = prompt()
    before = dict(sealed[0][1]["model_conds"])
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.model_options.items()}
    patched = running.apply(running.apply(MODEL, 1.0), 0.5)
    sample(patched, sealed)
    assert MODEL.model_options == options and not MODEL.wrappers
    assert sealed[0][1]["model_conds"] == before
    assert len(patched.model_options["transformer_options"]["patches"]["attn2_patch"]) == 1
    assert [len(found) for kind in patched.wrappers.values() for found in kind.values()] == [1, 1]
    clone = patched.clone()
    assert torch.equal(sample(clone, sealed), sample(patched, sealed))


def estimate(positive):
    return denoised(running.apply(MODEL, 1.0), positive)


def test_combine_is_the_mean_of_both_and_one_pass():
    sealed, other = prompt(), plain("a red robot")
    (both,) = host.ConditioningCombine().combine(sealed, other)
    with passes(MODEL) as sizes:
        found = estimate(both)
    assert sizes == [2]
    close(found, (estimate(sealed) + estimate(other)) / 2)
    second = action_identifiers.identifier(MODEL, seed=9, placeholder="<b>")
    (two,) = host.ConditioningCombine().combine(sealed, prompt("a <b> dog", [second]))
    expected = (estimate(sealed) + estimate(prompt("a <b> dog", [second]))) / 2
    close(estimate(two), expected)


def test_ranges_of_steps_act_in_their_steps_only():
    """The first half of the noise levels takes the action, the other the word."""
    sealed, word = prompt(), plain()
    (first,) = host.ConditioningSetTimestepRange().set_range(sealed, 0.0, 0.5)
    (second,) = host.ConditioningSetTimestepRange().set_range(word, 0.5, 1.0)
    border = float(MODEL.model.model_sampling.percent_to_sigma(0.5))
    for sigma, expected in ((2 * border, sealed), (border / 2, word)):
        sigmas = torch.tensor([sigma, 0.0])
        found = sample(running.apply(MODEL, 1.0), first + second, cfg=1.0, sigmas=sigmas)
        alone = sample(running.apply(MODEL, 1.0), expected, cfg=1.0, sigmas=sigmas)
        close(found, alone)
    # Out of its steps, a sealed prompt stops nobody.
    late = sample(MODEL, first + second, cfg=1.0, sigmas=torch.tensor([border / 2, 0.0]))
    assert torch.isfinite(late).all()


def test_areas_and_masks():
    sealed = prompt()
    (area,) = host.ConditioningSetArea().append(sealed, 32, 64, 0, 0, 1.0)
    (masked,) = host.ConditioningSetMask().append(sealed, torch.ones(1, 8, 8), "default", 1.0)
    close(estimate(masked), estimate(sealed))
    both = estimate(plain("a dog") + area)
    assert torch.isfinite(both).all()
    close(both[..., 4:], estimate(plain("a dog"))[..., 4:])
    far(both[..., :4], estimate(plain("a dog"))[..., :4])


def test_a_negative_with_an_area_meets_an_action_without_one():
    """The host then gives the positive a part there, of the negative's entry with the action's conditions."""
    sealed, place = prompt(), (32, 64, 0, 0, 1.0)
    (negative,) = host.ConditioningSetArea().append(plain("a dog"), *place)
    (part,) = host.ConditioningSetArea().append(sealed, *place)
    found = sample(running.apply(MODEL, 1.0), sealed, negative=negative + NEGATIVE)
    close(found, sample(running.apply(MODEL, 1.0), sealed + part, negative=negative + NEGATIVE))
    far(found, sample(running.apply(MODEL, 1.0), plain(), negative=negative + NEGATIVE))


def test_concat_with_the_action_first_adds_its_tokens_to_every_layer():
    sealed, more = prompt(), plain("on the moon")
    (joined,) = host.ConditioningConcat().concat(sealed, more)
    contexts = torch.cat([contexts_of(sealed), more[0][0].expand(4, -1, -1)], dim=1)
    (word,) = host.ConditioningConcat().concat(plain(), more)
    with forced(MODEL, contexts):
        expected = sample(MODEL, word, cfg=1.0)
    close(
        sample(running.apply(MODEL, 1.0), joined, cfg=1.0), expected
    )
    with passes(MODEL) as sizes:  # a negative of half the length is repeated by the host
        sample(running.apply(MODEL, 1.0), joined, cfg=2.0, steps=1)
    assert sizes == [2]


def test_what_the_layers_cannot_follow_is_refused_by_name():
    sealed = prompt()
    (averaged,) = host.ConditioningAverage().addWeighted(sealed, plain("a dog"), 0.5)
    (scaled,) = host.ConditioningMultiply().multiply(sealed, 0.5)
    for changed in (averaged, scaled):
        with pytest.raises(ValueError, match="<action> was averaged, scaled or otherwise changed"):
            sample(running.apply(MODEL, 1.0), changed)


def test_a_zeroed_copy_is_a_plain_negative():
    sealed = prompt()
    (zero,) = host.ConditioningZeroOut().zero_out(sealed)
    (expected,) = host.ConditioningZeroOut().zero_out(plain())
    close(estimate(zero), denoised(MODEL, expected))


@pytest.mark.parametrize("guider_class", [Guider_PerpNeg, Guider_DualCFG])
def test_other_guiders(guider_class):
    guider = guider_class(running.apply(MODEL, 1.0))
    conds = prompt(), tiny_model.conditioning(3), tiny_model.conditioning(4)
    guider.set_conds(*conds)
    guider.set_cfg(*((2.0, 1.0) if guider_class is Guider_PerpNeg else (2.0, 3.0)))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = guider.sample(noise, torch.zeros_like(noise), EULER, torch.tensor([5.0, 1.0, 0.0]), None, None, True, 1)
    assert torch.isfinite(out).all()
    without = guider_class(MODEL)
    without.set_conds(*conds)
    without.set_cfg(2.0, 1.0)
    with torch.inference_mode(), pytest.raises(ValueError, match="connect Apply"):
        without.sample(noise, torch.zeros_like(noise), EULER, torch.tensor([5.0, 0.0]), None, None, True, 1)


def test_batches_of_latents_and_16_bit_models():
    sealed = prompt()
    shape = (3, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    together = sample(running.apply(MODEL, 1.0), sealed, shape=shape)
    assert noise.shape == together.shape and not torch.equal(together[0], together[1])
    low = action_identifiers.reading(tiny_model.picture(dtype=torch.bfloat16))
    found = denoised(running.apply(low, 1.0), sealed)
    torch.testing.assert_close(found, estimate(sealed), rtol=0.1, atol=0.1 * float(found.std()))


def test_an_identifier_of_another_model_is_refused_before_a_pass():
    larger = action_identifiers.identifier(tiny_model.xl())
    sealed = prompt(actions=[larger])
    with passes(MODEL) as sizes, pytest.raises(
        ActionError,
        match="another kind of model, with 8 cross-attention layers .* this one has 4 .* is input 3, here input 1",
    ):
        sample(running.apply(MODEL, 1.0), sealed)
    assert sizes == []


def test_other_weights_warn_once_and_never_stop(caplog):
    base = running.apply(MODEL, 1.0).get_attachment(running.KEY).base
    own, other = (action_identifiers.identifier(MODEL, base=name) for name in (base, "0123456789abcdef"))
    with caplog.at_level(logging.WARNING):
        sample(running.apply(MODEL, 1.0), prompt(actions=[own]))
        assert "learnt beside other weights" not in caplog.text
        sample(running.apply(MODEL, 1.0), prompt(actions=[other]), steps=3)
        patched = running.apply(MODEL, 1.0)
        for name in ("0123456789abcdef", "0123456789abcdef", "fedcba9876543210"):
            sample(patched, prompt(actions=[action_identifiers.identifier(MODEL, base=name)]), steps=1)
    assert caplog.text.count("learnt beside other weights") == 1 + 2, "once for each file under one placeholder"
    assert running.fingerprint(tiny_model.picture()) != base


def test_a_lora_on_the_model_is_still_the_same_model():
    patched = MODEL.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    weight = MODEL.model.state_dict()[key]
    patched.add_patches({key: ("diff", (torch.ones_like(weight),))})
    before = running.fingerprint(patched)
    sample(patched, plain(), steps=1)
    assert running.fingerprint(patched) == before == running.fingerprint(MODEL)
    patched.unpatch_model()


class Doubling:
    """As a hypernetwork is for the host: a patch that changes keys and values, each otherwise."""

    def __call__(self, n, context, value, _extra_options):
        return n, 2 * context, 3 * value


def test_a_patch_of_keys_and_values_acts_on_the_action_before_apply_and_after():
    sealed, earlier = prompt(), MODEL.clone()
    earlier.set_model_attn2_patch(Doubling())
    later = running.apply(MODEL, 1.0)
    later.set_model_attn2_patch(Doubling())
    for positive in (sealed, plain()):
        found = sample(running.apply(earlier, 1.0), positive)
        assert torch.equal(found, sample(later, positive))
        far(found, sample(running.apply(MODEL, 1.0), positive))
    assert torch.equal(sample(running.apply(earlier, 1.0), plain()), sample(earlier, plain()))


def test_wan_blocks_read_their_own_context():
    model = tiny_model.wan()
    action = action_identifiers.identifier(model)
    sealed = prompt(actions=[action])
    shape = (1, 16, 1, 4, 4)
    contexts = contexts_of(sealed)
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
    found = sample(running.apply(model, 1.0), sealed, cfg=1.0, shape=shape)
    close(found, expected)
    far(found, sample(model, plain(), cfg=1.0, shape=shape))
    assert torch.equal(
        sample(running.apply(model, 0.0), sealed, shape=shape), sample(model, plain(), shape=shape)
    )


def test_rows_of_unequal_lengths_are_repeated_and_what_is_before_the_prompt_stays():
    contexts = BatchContexts((Rows(2, None), Rows(1, torch.randn(1, 4, 6, 8))), length=4)
    context = torch.randn(3, 3 + 4, 8)
    read = contexts.at(2, context)
    assert read.shape == (3, 3 + 12, 8) and torch.equal(read[:, :3], context[:, :3])
    assert torch.equal(read[:2, 3:], context[:2, 3:].repeat(1, 3, 1))
    assert torch.equal(read[2, 3:], contexts.rows[1].contexts[0, 2].repeat(2, 1))


def test_lengths_that_differ_leave_nothing_between():
    with pytest.raises(ActionError, match="set strength to 0 or 1"):
        blended(torch.zeros(1, 77, 8), torch.zeros(4, 154, 8), 0.5)
    assert blended(torch.zeros(1, 77, 8), torch.ones(4, 154, 8), 1.0).shape == (4, 154, 8)
