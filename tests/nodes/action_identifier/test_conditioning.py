"""ComfyUI's own conditioning nodes and guiders on an action's prompt: what they do to it, and what is refused."""

import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from pack.nodes.action_identifier import sampling
from support import action_identifiers, tiny_model
from support.action_runs import (
    EULER,
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

import nodes as core_nodes


def test_combine_is_the_mean_of_both_and_one_pass():
    attached, other = prompt(), plain("a red robot")
    (both,) = core_nodes.ConditioningCombine().combine(attached, other)
    with passes(MODEL) as sizes:
        actual = estimate(both)
    assert sizes == [2]
    close(actual, (estimate(attached) + estimate(other)) / 2)
    second = action_identifiers.identifier(MODEL, seed=9, placeholder="<b>")
    (two,) = core_nodes.ConditioningCombine().combine(attached, prompt("a <b> dog", [second]))
    expected = (estimate(attached) + estimate(prompt("a <b> dog", [second]))) / 2
    close(estimate(two), expected)


def test_ranges_of_steps_act_in_their_steps_only():
    """The first half of the noise levels takes the action, the other the word."""
    attached, word = prompt(), plain()
    (first,) = core_nodes.ConditioningSetTimestepRange().set_range(attached, 0.0, 0.5)
    (second,) = core_nodes.ConditioningSetTimestepRange().set_range(word, 0.5, 1.0)
    border = float(MODEL.model.model_sampling.percent_to_sigma(0.5))
    for sigma, expected in ((2 * border, attached), (border / 2, word)):
        sigmas = torch.tensor([sigma, 0.0])
        actual = sample(sampling.apply(MODEL, 1.0), first + second, cfg=1.0, sigmas=sigmas)
        alone = sample(sampling.apply(MODEL, 1.0), expected, cfg=1.0, sigmas=sigmas)
        close(actual, alone)
    # Out of its steps, a attached prompt stops nobody.
    late = sample(MODEL, first + second, cfg=1.0, sigmas=torch.tensor([border / 2, 0.0]))
    assert torch.isfinite(late).all()


def test_areas_and_masks():
    attached = prompt()
    (area,) = core_nodes.ConditioningSetArea().append(attached, 32, 64, 0, 0, 1.0)
    (masked,) = core_nodes.ConditioningSetMask().append(attached, torch.ones(1, 8, 8), "default", 1.0)
    close(estimate(masked), estimate(attached))
    both = estimate(plain("a dog") + area)
    assert torch.isfinite(both).all()
    close(both[..., 4:], estimate(plain("a dog"))[..., 4:])
    far(both[..., :4], estimate(plain("a dog"))[..., :4])


def test_a_negative_with_an_area_meets_an_action_without_one():
    """ComfyUI then gives the positive a part there, of the negative's entry with the action's conditions."""
    attached, place = prompt(), (32, 64, 0, 0, 1.0)
    (negative,) = core_nodes.ConditioningSetArea().append(plain("a dog"), *place)
    (part,) = core_nodes.ConditioningSetArea().append(attached, *place)
    actual = sample(sampling.apply(MODEL, 1.0), attached, negative=negative + NEGATIVE)
    close(actual, sample(sampling.apply(MODEL, 1.0), attached + part, negative=negative + NEGATIVE))
    far(actual, sample(sampling.apply(MODEL, 1.0), plain(), negative=negative + NEGATIVE))


def test_concat_with_the_action_first_adds_its_tokens_to_every_layer():
    attached, other = prompt(), plain("on the moon")
    (joined,) = core_nodes.ConditioningConcat().concat(attached, other)
    contexts = torch.cat([contexts_of(attached), other[0][0].expand(4, -1, -1)], dim=1)
    (word,) = core_nodes.ConditioningConcat().concat(plain(), other)
    with forced(MODEL, contexts):
        expected = sample(MODEL, word, cfg=1.0)
    close(
        sample(sampling.apply(MODEL, 1.0), joined, cfg=1.0), expected
    )
    with passes(MODEL) as sizes:  # a negative of half the length is repeated by ComfyUI
        sample(sampling.apply(MODEL, 1.0), joined, cfg=2.0, steps=1)
    assert sizes == [2]


def test_what_the_layers_cannot_follow_is_refused_by_name():
    attached = prompt()
    (averaged,) = core_nodes.ConditioningAverage().addWeighted(attached, plain("a dog"), 0.5)
    (scaled,) = core_nodes.ConditioningMultiply().multiply(attached, 0.5)
    for changed in (averaged, scaled):
        with pytest.raises(ValueError, match="<action> was averaged, scaled or otherwise changed"):
            sample(sampling.apply(MODEL, 1.0), changed)


def test_a_zeroed_copy_is_a_plain_negative():
    attached = prompt()
    (zero,) = core_nodes.ConditioningZeroOut().zero_out(attached)
    (expected,) = core_nodes.ConditioningZeroOut().zero_out(plain())
    close(estimate(zero), denoised(MODEL, expected))


@pytest.mark.parametrize("guider_class", [Guider_PerpNeg, Guider_DualCFG])
def test_other_guiders(guider_class):
    guider = guider_class(sampling.apply(MODEL, 1.0))
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
