"""The wrapped samplers against plain ones, on a tiny real model."""

import copy

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG, Guider_DualModel
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_void import VOID_DDIM
from pack.nodes.patching import samplers
from support import tiny_model

MODEL = tiny_model.picture()
FLOW = tiny_model.picture(flow=True)


def begin_with(guide):
    return lambda model, shape: guide


class Recorder(comfy.samplers.Sampler):
    """Runs a sampler and keeps what it asks the model for."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.evaluated = []
        self.grid = []

    def sample(self, model_wrap, sigmas, *args, **kwargs):
        outer = self
        self.grid = sigmas.tolist()

        class Model:
            def __call__(self, x, sigma, model_options, **options):
                outer.evaluated.append(float(sigma[0]))
                return model_wrap(x, sigma, model_options=model_options, **options)

            def __getattr__(self, name):
                return getattr(model_wrap, name)

        return self.sampler.sample(Model(), sigmas, *args, **kwargs)


def test_the_denoised_guide_sees_every_estimate_after_the_models_own_functions():
    model = MODEL.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0 + 5)
    seen = []

    def guide(estimate, sigma):
        seen.append((float(estimate.mean()), sigma))
        return estimate + 1

    sampler = Recorder(comfy.samplers.sampler_object("heun"))
    result = tiny_model.sample(model, samplers.guide_denoised(sampler, begin_with(guide)), steps=3)
    assert [value for value, _ in seen] == [5.0] * 5
    assert [sigma for _, sigma in seen] == sampler.evaluated
    torch.testing.assert_close(result, torch.full_like(result, 6 / 0.18215))


def guider(kind, cfg):
    positive, negative, third = (tiny_model.conditioning(i) for i in (1, 2, 4))
    if kind == "CFG":
        guider = comfy.samplers.CFGGuider(MODEL)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
    elif kind == "PerpNeg":
        guider = Guider_PerpNeg(MODEL)
        guider.set_conds(positive, negative, third)
        guider.set_cfg(cfg, 1.0)
    elif kind == "DualModel":
        guider = Guider_DualModel(MODEL, MODEL.clone())
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
    else:
        guider = Guider_DualCFG(MODEL)
        guider.set_conds(positive, third, negative)
        guider.set_cfg(cfg, 8.0, kind == "nested DualCFG")
    return guider


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["CFG", "PerpNeg", "DualModel", "DualCFG", "nested DualCFG"])
def test_the_denoised_guide_has_the_last_word_with_every_guider(kind, cfg):
    """A guide that answers a constant makes euler end on it, whatever the guider calculates."""
    grid = comfy.samplers.calculate_sigmas(MODEL.get_model_object("model_sampling"), "normal", 4)
    wanted = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sampler = samplers.guide_denoised(
        comfy.samplers.sampler_object("euler"), begin_with(lambda _x, _sigma: MODEL.model.process_latent_in(wanted))
    )
    with torch.inference_mode():
        result = guider(kind, cfg).sample(torch.randn(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), sampler, grid, seed=3)
    torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)


def test_wrapping_changes_neither_model_nor_sampler_and_leaves_nothing_behind():
    sampler = comfy.samplers.ksampler("euler_cfg_pp")
    options, attributes = copy.deepcopy(MODEL.model_options), dict(vars(sampler))
    plain = tiny_model.sample(MODEL, sampler)
    for wrap in (samplers.guide_denoised, samplers.guide_latent):
        wrapped = wrap(sampler, begin_with(lambda x, sigma: x + 0.3))
        guided = tiny_model.sample(MODEL, wrapped)
        assert not torch.equal(guided, plain)
        assert torch.equal(tiny_model.sample(MODEL, wrapped), guided)
        assert torch.equal(tiny_model.sample(MODEL, sampler), plain)
        assert MODEL.model_options == options and vars(sampler) == attributes


def test_begin_is_called_once_a_run_and_before_the_model():
    runs = []

    def begin(model, shape):
        runs.append((model, shape))
        raise ValueError("does not fit")

    for wrap in (samplers.guide_denoised, samplers.guide_latent):
        sampler = Recorder(comfy.samplers.sampler_object("euler"))
        # Only a KSAMPLER can be taken apart, so the recorder goes around the one and inside the other.
        wrapped = wrap(sampler, begin) if wrap is samplers.guide_denoised else wrap(sampler.sampler, begin)
        with pytest.raises(ValueError, match="does not fit"):
            tiny_model.sample(MODEL, wrapped, shape=(2, 4, 8, 6))
        assert sampler.evaluated == []
    assert [shape for _, shape in runs] == [(2, 4, 8, 6)] * 2
    assert all(model is MODEL.model for model, _ in runs)


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_the_list_of_stepwise_samplers_is_what_the_samplers_do(name):
    """Once a step, on the grid, and equal bit for bit when taken apart: those and no others."""
    fits = []
    for model in (MODEL, FLOW):
        sampler = comfy.samplers.sampler_object(name)
        recorder = Recorder(sampler)
        whole = tiny_model.sample(model, recorder, steps=5)
        apart = copy.copy(sampler)
        apart.sampler_function = samplers._step_by_step(sampler.sampler_function, lambda x, sigma: x)
        fits.append(
            recorder.evaluated == recorder.grid[:-1]
            and torch.equal(tiny_model.sample(model, apart, steps=5), whole)
        )
    assert fits == [name in samplers.STEPWISE_SAMPLERS or name == "ddim"] * 2


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_the_latent_of_other_samplers_is_refused_by_name(name):
    sampler = comfy.samplers.sampler_object(name)
    if name in samplers.STEPWISE_SAMPLERS or name == "ddim":
        samplers.guide_latent(sampler, begin_with(None))
        return
    with pytest.raises(
        ValueError, match=f"{name.removesuffix('_bh2').replace('uni_pc', 'unipc')}.*ddim, euler.*denoised"
    ):
        samplers.guide_latent(sampler, begin_with(None))


def test_the_latent_is_refused_with_options_that_span_the_run():
    for name, options in (("euler", {"s_churn": 1.0}), ("lcm", {"s_noise": 1.0, "s_noise_end": 0.0})):
        with pytest.raises(ValueError, match="reset them"):
            samplers.guide_latent(comfy.samplers.ksampler(name, options), begin_with(None))
    samplers.guide_latent(
        comfy.samplers.ksampler("lcm", {"s_noise": 1.0, "s_noise_end": 1.0}), begin_with(None)
    )
    with pytest.raises(ValueError, match="VOID_DDIM"):
        samplers.guide_latent(VOID_DDIM(), begin_with(None))


class PublishedLoop(comfy.samplers.Sampler):
    """DDIM in the paper's variance-preserving latents, updated after each step but the last."""

    def __init__(self, guide):
        self.guide = guide

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        retained = 1 / (1 + sigmas.double() ** 2)  # the cumulative product of alphas
        z = noise.double()
        for i in range(len(sigmas) - 1):
            x = (z / retained[i].sqrt()).float()
            clean = model_wrap(
                x, sigmas[i].expand(len(x)), model_options=extra_args["model_options"]
            ).double()
            predicted = (z - retained[i].sqrt() * clean) / (1 - retained[i]).sqrt()
            z = retained[i + 1].sqrt() * clean + (1 - retained[i + 1]).sqrt() * predicted
            if i < len(sigmas) - 2:
                z = self.guide(z, float(sigmas[i + 1]))
        return z.float()


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_guiding_the_latent_is_the_published_loop(name):
    def guide(z, sigma):
        return 0.9 * z + 0.2 / (1 + sigma)

    wrapped = samplers.guide_latent(comfy.samplers.sampler_object(name), begin_with(guide))
    expected = tiny_model.sample(MODEL, PublishedLoop(guide), steps=6)
    torch.testing.assert_close(tiny_model.sample(MODEL, wrapped, steps=6), expected, rtol=1e-3, atol=2e-3)


def test_the_latent_guide_is_called_between_steps_and_previews_count_on():
    seen, previews = [], []

    def preview(step, estimate, x, total):
        previews.append((step, total))

    wrapped = samplers.guide_latent(
        comfy.samplers.sampler_object("euler_ancestral_cfg_pp"),
        begin_with(lambda z, sigma: seen.append(sigma) or z),
    )
    grid = comfy.samplers.calculate_sigmas(MODEL.get_model_object("model_sampling"), "karras", 5)
    tiny_model.sample(MODEL, wrapped, sigmas=grid, callback=preview)
    assert seen == grid[1:-1].tolist()
    assert previews == [(i, 5) for i in range(5)]


def test_cfg_pp_functions_do_not_pile_up():
    """The CFG++ samplers add a post-CFG function in every call, and a run taken apart is many calls."""
    counted = []
    wrapped = samplers.guide_latent(comfy.samplers.ksampler("euler_cfg_pp"), begin_with(lambda z, sigma: z))
    model = MODEL.clone()
    model.set_model_sampler_post_cfg_function(
        lambda args: (
            counted.append(len(args["model_options"]["sampler_post_cfg_function"])) or args["denoised"]
        )
    )
    tiny_model.sample(model, wrapped, steps=4)
    assert counted == [2] * 4


@pytest.mark.parametrize("wrap", [samplers.guide_denoised, samplers.guide_latent])
@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_a_latent_mask_keeps_its_region(wrap, model):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    wrapped = wrap(comfy.samplers.sampler_object("ddim"), begin_with(lambda x, sigma: x + 3))
    result = tiny_model.sample(model, wrapped, latent=latent, denoise_mask=mask)
    torch.testing.assert_close(result[..., :4], latent[..., :4], rtol=1e-3, atol=1e-3)
    plain = tiny_model.sample(model, comfy.samplers.sampler_object("ddim"), latent=latent, denoise_mask=mask)
    assert (result - plain)[..., 4:].abs().mean() > 0.1
    # A run that stops early hands its latent on: the kept region is then also that of the plain run.
    grid = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)[:4]
    part, plain = (
        tiny_model.sample(model, sampler, sigmas=grid, latent=latent, denoise_mask=mask)
        for sampler in (wrapped, comfy.samplers.sampler_object("ddim"))
    )
    torch.testing.assert_close(part[..., :4], plain[..., :4], rtol=1e-4, atol=1e-3)
    assert (part - plain)[..., 4:].abs().mean() > 0.1
