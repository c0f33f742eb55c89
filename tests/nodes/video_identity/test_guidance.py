"""Guidance by the reference, as a third branch: against the explicit combination of separate passes."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode
from pack.nodes.patching import models
from pack.nodes.video_identity import method
from support import published_wan, tiny_model
from support.video_identities import (
    ADAPTER,
    EULER,
    MODEL,
    SHAPE,
    call,
    draw,
    person,
    picture_latent,
    relative,
    sample,
    shown,
)

TEXT, NEGATIVE = tiny_model.conditioning(1), tiny_model.conditioning(2)
LEFT = torch.zeros(1, 16, 12)
LEFT[..., :6] = 1


def euler(estimate, steps=3, model=MODEL, shape=SHAPE):
    """The Euler run, in fp64, whose estimate of the clean video at each step is estimate(x, sigma)."""
    base = model.model
    x = draw(3, *shape).double()
    grid = comfy.samplers.calculate_sigmas(base.model_sampling, "simple", steps).double()
    for sigma, after in zip(grid[:-1], grid[1:], strict=True):
        x = x + (after - sigma) * (x - estimate(x, sigma)) / sigma
    return base.process_latent_out(x)


def estimate_of(model, conditioning, x, sigma, **conditions):
    return call(model, x.float(), float(sigma), conditioning[0][0], **conditions).double()


def counted(model):
    """`model`, and the sizes of the batches in which it is called."""
    model, calls = model.clone(), []
    model.add_wrapper(WrappersMP.APPLY_MODEL, lambda run, x, *rest, **named: calls.append(len(x)) or run(
        x, *rest, **named
    ))
    return model, calls


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_is_the_explicit_combination_of_published_models(cfg):
    """Three separate passes of the published formulas, in fp64 and without a cache, for every step."""
    wan = published_wan.Wan(MODEL.model.diffusion_model.state_dict(), 2, 32, ADAPTER.tensors())
    picture = MODEL.model.process_latent_in(picture_latent())

    def estimate(x, sigma):
        def of(conditioning, reference):
            time = MODEL.model.model_sampling.timestep(sigma[None])
            return x - sigma * wan(x, time, conditioning[0][0], reference)

        text, negative, without = of(TEXT, picture), of(NEGATIVE, picture), of(TEXT, None)
        return negative + cfg * (text - negative) + 1.5 * (text - without)

    guided = sample(shown(reference_guidance=1.5), cfg=cfg)
    assert relative(guided, euler(estimate)) < 5e-5
    assert relative(guided, sample(shown(), cfg=cfg)) > 0.02


def test_each_reference_has_a_scale_of_its_own_within_masks():
    people = [person(mask=LEFT), person(seed=5, mask=1 - LEFT, strength=0.6), person(seed=6)]
    both, scales = shown(MODEL, *people), (0.7, 2.0, 0.0)

    def estimate(x, sigma):
        text, negative = (estimate_of(both, c, x, sigma) for c in (TEXT, NEGATIVE))
        result = negative + 2.0 * (text - negative)
        for i, scale in enumerate(scales[:2]):
            others = shown(MODEL, *people[:i], *people[i + 1:])
            result = result + scale * (text - estimate_of(others, TEXT, x, sigma))
        return result

    guided = [person(mask=LEFT, reference_guidance=0.7),
              person(seed=5, mask=1 - LEFT, strength=0.6, reference_guidance=2.0), person(seed=6)]
    model, calls = counted(shown(MODEL, *guided))
    assert relative(sample(model), euler(estimate)) < 5e-5
    assert calls == [2, 1, 1] * 3


def test_off_is_bit_identical_and_costs_nothing():
    for settings in ({}, {"strength": 0.5}, {"mask": LEFT}):
        model = shown(MODEL, person(**settings, reference_guidance=0.0))
        assert "sampler_post_cfg_function" not in model.model_options
        model, calls = counted(model)
        assert torch.equal(sample(model), sample(shown(MODEL, person(**settings)))) and calls == [2] * 3
    # Scaled, but no step of this schedule lies in its range; or nothing shows it.
    idle = shown(MODEL, person(start_percent=0.0001, end_percent=0.0002, reference_guidance=4.0))
    assert torch.equal(sample(idle), sample(MODEL))
    assert shown(MODEL, person(strength=0.0, reference_guidance=4.0)) is MODEL
    assert shown(MODEL, person(mask=0 * LEFT, reference_guidance=4.0)) is MODEL
    before, calls = counted(shown(MODEL, person(end_percent=0.5, reference_guidance=4.0)))
    sample(before)
    limit = MODEL.model.model_sampling.percent_to_sigma(0.5)
    sigmas = comfy.samplers.calculate_sigmas(MODEL.model.model_sampling, "simple", 3)[:-1]
    assert calls == [n for sigma in sigmas for n in ([2, 1] if sigma > limit else [2])] and 0 < calls.count(1) < 3


def test_split_and_batched_guidance_agree(monkeypatch):
    model, calls = counted(shown(reference_guidance=1.5))
    batched = sample(model)
    assert calls == [2, 1] * 3
    calls.clear()
    free = comfy.model_management.get_free_memory
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda d=None, both=False: free(d, True) if both else 0
    )
    assert relative(sample(model), batched) < 1e-5 and calls == [1, 1, 1] * 3


def test_the_reference_still_passes_once_and_nothing_outlives_a_run():
    model = shown(reference_guidance=1.5)
    first = sample(model)
    run = models.attachment(model, "understudy_video_identity")
    assert not run.guidance._directions and len(run.cache) == 0
    assert torch.equal(sample(model), first)


def test_a_chain_has_one_function_after_cfg_at_its_first_place():
    def halved(args):
        return args["denoised"] / 2

    model = shown(reference_guidance=1.0).clone()
    model.set_model_sampler_post_cfg_function(halved)
    chained = shown(model, person(seed=5))
    functions = chained.model_options["sampler_post_cfg_function"]
    assert len(functions) == 2 and functions[1] is halved and len(functions[0].references) == 2
    assert len(model.model_options["sampler_post_cfg_function"][0].references) == 1


def test_guiders_of_two_texts_guide_too():
    def result(model, nested):
        guider = Guider_DualCFG(model)
        guider.set_conds(TEXT, tiny_model.conditioning(7), NEGATIVE)
        guider.set_cfg(2.0, 1.5, nested)
        grid = comfy.samplers.calculate_sigmas(MODEL.model.model_sampling, "simple", 2)
        with torch.inference_mode():
            return guider.sample(draw(3, *SHAPE), torch.zeros(SHAPE), EULER, grid, None, None, True, 3)

    for nested in (False, True):
        plain, guided = (result(shown(reference_guidance=g), nested) for g in (0.0, 1.0))
        assert relative(guided, plain) > 0.01 and torch.isfinite(guided).all()


def test_a_step_that_easycache_skips_keeps_the_direction_of_the_last_one():
    def cached(model, threshold):
        return EasyCacheNode.execute(model, threshold, 0.1, 1.0, False).result[0]

    # A threshold that nothing stays below: the cache takes part and skips nothing.
    model = shown(reference_guidance=1.5)
    assert torch.equal(sample(cached(model, 0.0), steps=6), sample(model, steps=6))
    skipping, calls = counted(cached(model, 10.0))
    passes = []
    skipping.add_wrapper(WrappersMP.DIFFUSION_MODEL, lambda run, x, *a, **k: passes.append(len(x)) or run(x, *a, **k))
    result = sample(skipping, steps=6)
    assert calls.count(2) == 6 and calls.count(1) < 6  # the pass is skipped with the step
    plain = sample(cached(shown(), 10.0), steps=6)
    # The cache must not take the pass without the reference for that with it.
    assert relative(sample(cached(shown(reference_guidance=1e-4), 10.0), steps=6), plain) < 1e-3
    assert torch.isfinite(result).all() and relative(result, plain) > 0.01


def test_windows_of_frames_guide_by_window():
    mask = torch.ones(17, 16, 12)
    mask[9:] = 0.5

    def windowed(guidance):
        settings = (9, 5, "standard_static", 1, False, "pyramid", False, False)
        model = shown(MODEL, person(mask=mask, reference_guidance=guidance))
        return counted(WanContextWindowsManualNode.execute(model, *settings).result[0])

    results = []
    for guidance, per_step in ((0.0, [2, 2]), (1.0, [2, 2, 1, 1])):
        model, calls = windowed(guidance)
        results.append(sample(model, shape=(1, 16, 5, 8, 6)))
        assert calls == per_step * 3
    assert relative(*results) > 0.01


@pytest.mark.parametrize("kind", ["i2v", "vace", "animate", "fun", "wan2.2 5B"])
def test_relatives_of_wan_are_guided(kind):
    """One step of Euler to sigma 0 is the estimate itself."""
    model = tiny_model.wan(kind, num_layers=5 if kind == "animate" else 1)
    channels = model.model.latent_format.latent_channels
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    shape = (1, channels, 2, 4, 6)
    one = {"adapter": adapter, "latent": picture_latent(1, channels=channels)}
    plain, with_reference, guided = (
        sample(patched, shape, 1, cfg=1.0)
        for patched in (model, shown(model, person(**one)), shown(model, person(**one, reference_guidance=2.0)))
    )
    assert relative(guided, with_reference + 2.0 * (with_reference - plain)) < 1e-4
    assert relative(guided, with_reference) > 1e-3


def test_wan_2_2_has_a_scale_for_each_of_its_two_models():
    low = tiny_model.wan(seed=7)
    low_adapter = method.adapter_from(tiny_model.video_adapter(low, seed=7))
    grid = comfy.samplers.calculate_sigmas(MODEL.model.model_sampling, "simple", 4)

    def pair(high_scale, low_scale):
        first = sample(shown(reference_guidance=high_scale), sigmas=grid[:3])
        second = shown(low, person(adapter=low_adapter, reference_guidance=low_scale))
        return sample(second, sigmas=grid[2:], latent=first)

    results = [pair(*scales) for scales in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))]
    assert all(relative(a, b) > 1e-3 for i, a in enumerate(results) for b in results[:i])
