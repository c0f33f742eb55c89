"""Inversion through ComfyUI's model call: exact where it should be, for ε-, v- and flow-prediction."""

import math

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import latent_preview
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from pack.nodes.identity_prior import method
from pack.nodes.identity_prior.attention import AttentionRecorder
from pack.nodes.identity_prior.config import InversionConfig, MaskConfig
from pack.nodes.identity_prior.inversion import InvertedNoise
from support import tiny_model
from support.identity_edits import KINDS, MODEL, SHAPE, grid, inverted, latent, prompt

SAMPLERS = ("euler", "ddim")


def reconstruct(model, inversion, sampler="euler", source=None, sigmas=None):
    """What SamplerCustomAdvanced makes of the inverted noise under the same prompt."""
    source = latent() if source is None else source
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(), prompt())
    guider.set_cfg(1.0)
    noise = InvertedNoise(model, inversion).generate_noise(source)
    sigmas = torch.tensor(inversion.trajectory.sigmas) if sigmas is None else sigmas
    with torch.inference_mode():
        return guider.sample(
            noise, source["samples"], comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0
        )


def error(model, method_name, iterations=8, **options):
    inversion = inverted(model, method=method_name, iterations=iterations, **options)
    return float((reconstruct(model, inversion) - latent()["samples"]).abs().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_more_accurate_methods_find_back_better(kind):
    model = KINDS[kind]()
    errors = {name: error(model, name) for name in ("ddim", "renoise", "fixed_point")}
    assert errors["fixed_point"] < 0.1 * errors["ddim"]
    assert errors["renoise"] < errors["ddim"]
    precise = error(model, "fixed_point", 16)
    assert error(model, "fixed_point", 2) > errors["fixed_point"]
    assert precise < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_the_formula_of_the_paper_backwards(kind):
    """DDIM's step (arXiv 2010.02502, eq. 12) written out in its alphas, for noise and v; an explicit Euler for flow.

    The estimates are this model's, and no other program's inversion runs beside it.
    """
    model = KINDS[kind]()
    sampling = model.get_model_object("model_sampling")
    sigmas = grid(model, 5)
    inversion = inverted(model, method="ddim", sigmas=sigmas)
    x = inversion.trajectory.clean.double()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(), prompt())
    guider.set_cfg(1.0)
    asked = []

    class Asking(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args):
            z = x
            for high, low in zip(sigmas[:-1].flip(0).double(), sigmas[1:].flip(0).double(), strict=True):
                if kind == "flow":
                    clean = model_wrap(z.float(), high.float().expand(len(z)), **extra_args).double()
                    z = z + (high - low) * (z - clean) / high
                else:
                    # In the paper's terms: z = sqrt(a) x0 + sqrt(1 - a) e, with a = 1 / (1 + sigma²).
                    a, b = 1 / (1 + low**2), 1 / (1 + high**2)
                    paper = z * a.sqrt()
                    clean = model_wrap((paper / b.sqrt()).float(), high.float().expand(len(z)), **extra_args).double()
                    noise_part = (paper - b.sqrt() * clean) / (1 - b).sqrt()
                    # The estimate of x0 at the lower level belongs to this very noise.
                    start = (paper - (1 - a).sqrt() * noise_part) / a.sqrt()
                    z = (b.sqrt() * start + (1 - b).sqrt() * noise_part) / b.sqrt()
                asked.append(z)
            return latent_image

    with torch.inference_mode():
        guider.sample(torch.zeros(SHAPE), latent()["samples"], Asking(), sigmas, disable_pbar=True, seed=0)
    expected = torch.stack([*asked[::-1], x])
    torch.testing.assert_close(inversion.trajectory.latents.double(), expected, rtol=1e-3, atol=2e-3)
    assert sampling is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_right_for_any_latent_image_and_the_first_sigma(kind):
    model = KINDS[kind]()
    sampling = model.get_model_object("model_sampling")
    for steps, skip in ((6, 0), (6, 2)):  # from the highest sigma, max denoise included, and from a later one
        sigmas = grid(model, steps)[skip:]
        inversion = inverted(model, sigmas=sigmas)
        for source in (latent(), {"samples": torch.zeros(SHAPE)}, {"samples": torch.randn(SHAPE)}):
            noise = InvertedNoise(model, inversion).generate_noise(source)
            image = source["samples"].clone()
            image = model.model.process_latent_in(image) if image.any() else image
            most = comfy.samplers.Sampler().max_denoise(
                type("Wrap", (), {"inner_model": model.model}), sigmas
            )
            assert most == (skip == 0)
            x = sampling.noise_scaling(sigmas[0], noise, image, most)
            torch.testing.assert_close(x, inversion.trajectory.latents[0], rtol=1e-4, atol=1e-4)
    result = reconstruct(model, inverted(model, iterations=16), source={"samples": torch.zeros(SHAPE)})
    assert (result - latent()["samples"]).abs().mean() < 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_euler_and_ddim_walk_back_on_the_path(sampler):
    model = KINDS["eps"]()
    inversion = inverted(model, iterations=12)
    seen = []
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(), prompt())
    guider.set_cfg(1.0)
    noise = InvertedNoise(model, inversion).generate_noise(latent())
    with torch.inference_mode():
        guider.sample(
            noise, latent()["samples"], comfy.samplers.sampler_object(sampler),
            torch.tensor(inversion.trajectory.sigmas), callback=lambda i, d, x, n: seen.append(x.clone()),
            disable_pbar=True, seed=0,
        )
    for x, stored in zip(seen, inversion.trajectory.latents, strict=False):
        torch.testing.assert_close(x, stored, rtol=1e-3, atol=2e-3)


def test_the_source_mask_is_of_the_mean_map_of_the_steps_and_each_step_is_shown(monkeypatch):
    model = KINDS["eps"]()
    heats, shown = [], []
    original = AttentionRecorder.heat

    def heat(recorder, *earlier):
        heats.append(original(recorder, *earlier))
        return heats[-1]

    monkeypatch.setattr(AttentionRecorder, "heat", heat)
    monkeypatch.setattr(latent_preview, "prepare_callback", lambda _model, steps: lambda *call: shown.append(call))
    inversion = inverted(model, iterations=2)
    assert len(heats) == 12
    expected = method.subject_mask(torch.stack(heats[1::2]).mean(0), SHAPE[-2:], MaskConfig(grow=0))
    assert torch.equal(inversion.source_mask, expected)
    assert [(step, count) for step, _, _, count in shown] == [(i, 6) for i in range(6)]
    for (_, _, x, _), stored in zip(shown, inversion.trajectory.latents[:-1].flip(0), strict=True):
        assert torch.equal(x, stored)


def test_video_models_and_batches():
    wan = tiny_model.wan()
    shape = (1, 16, 3, 8, 6)
    clip = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    inversion = inverted(wan, source=clip, steps=3, iterations=3)
    assert inversion.trajectory.latents.shape == (4, *shape) and inversion.source_mask.shape == (1, 3, 8, 6)
    model = KINDS["eps"]()
    pair = {"samples": torch.cat([latent(1)["samples"], latent(2)["samples"]])}
    both = inverted(model, source=pair)
    for i, seed in enumerate((1, 2)):
        alone = inverted(model, source=latent(seed))
        torch.testing.assert_close(
            both.trajectory.latents[:, i : i + 1], alone.trajectory.latents, rtol=1e-4, atol=1e-4
        )
        # A cell that lies on the threshold may fall to either side.
        assert (both.source_mask[i : i + 1] != alone.source_mask).sum() <= 1


@pytest.mark.parametrize("nodes", [(EasyCacheNode,), (LazyCacheNode,), (EasyCacheNode, LazyCacheNode)])
@pytest.mark.parametrize("name", ["ddim", "fixed_point"])
def test_step_caches_are_left_out_of_the_inversion_and_stay_on_the_model(nodes, name, caplog):
    """With their defaults they ended in a TypeError, since they expect falling sigmas."""
    cached = MODEL
    for node in nodes:
        cached = node.execute(cached, 0.2, 0.15, 0.95, False).result[0]
    caplog.set_level("INFO")
    path = inverted(cached, method=name, steps=10).trajectory.latents
    assert torch.equal(path, inverted(MODEL, method=name, steps=10).trajectory.latents)
    assert f"{cached.model_options['transformer_options']['easycache'].name} is left out" in caplog.text
    assert all(cached.wrappers[WrappersMP.OUTER_SAMPLE][node.__name__.removesuffix("Node").lower()] for node in nodes)


def test_the_model_is_left_alone_and_the_size_is_known():
    model = KINDS["eps"]()
    before = dict(model.model_options["transformer_options"])
    weights = {name: weight.clone() for name, weight in model.model.named_parameters()}
    inversion = inverted(model)
    assert model.model_options["transformer_options"] == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.named_parameters())
    assert inversion.megabytes == pytest.approx(7 * 4 * 64 * 4 / 2**20)


@pytest.mark.parametrize(("source", "words"), [
    ({"samples": torch.zeros(SHAPE)}, "all zero"),
    ({"samples": torch.full(SHAPE, torch.nan)}, "NaN"),
    ({"samples": torch.zeros(0, 4, 8, 8)}, "VAE Encode"),
    ({"samples": torch.ones(1, 16, 8, 8)}, "16 channels and the model's latents have 4: encode it"),
    ({"samples": torch.ones(1, 4, 2, 8, 8)}, r"model's latents are \[B, 4, H, W\]"),
])
def test_latents_that_cannot_be_inverted_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        inverted(KINDS["eps"](), source=source)


@pytest.mark.parametrize("sigmas", [
    [5.0, 2.0], [5.0], [2.0, 5.0, 0.0], [5.0, 5.0, 0.0], [],
    [math.nan, 2.0, 0.0], [5.0, math.nan, 0.0], [math.inf, 2.0, 0.0],
])
def test_sigmas_that_do_not_fall_to_zero_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas do not fall to 0"):
        inverted(KINDS["eps"](), sigmas=torch.tensor(sigmas))


def test_prompts_without_the_subject_and_other_predictions_are_refused():
    model = KINDS["eps"]()
    with pytest.raises(ValueError, match="connect Encode Identity to `positive`"):
        inverted(model, positive=tiny_model.conditioning(1))
    odd = model.clone()

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
        pass

    odd.add_object_patch("model_sampling", Sampling())
    with pytest.raises(ValueError, match="inversion is not known for a model of X0"):
        inverted(odd)
    with pytest.raises(ValueError, match="connect the inverted latent"):
        InvertedNoise(model, inverted(model)).generate_noise({"samples": torch.zeros(1, 4, 8, 6)})


def test_a_video_model_wants_a_video_latent():
    with pytest.raises(ValueError, match=r"latents are \[B, 16, T, H, W\]"):
        inverted(tiny_model.wan(), source={"samples": torch.ones(1, 16, 8, 8)})


def test_numbers_that_are_not_finite_stop_the_inversion():
    broken = KINDS["eps"]().clone()
    broken.set_model_unet_function_wrapper(lambda run, a: run(a["input"], a["timestep"], **a["c"]) * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite at sigma 0.*set method to ddim"):
        inverted(broken)


def test_an_interrupt_stops_within_a_call(monkeypatch):
    model = KINDS["eps"]()
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inverted(model)
    monkeypatch.undo()
    assert torch.isfinite(inverted(model).trajectory.latents).all()


def test_trajectories_are_exact_on_the_grid_and_straight_between():
    latents = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    path = method.Trajectory([8.0, 4.0, 1.0, 0.0], latents)
    for i, sigma in enumerate(path.sigmas):
        assert torch.equal(path.at(sigma), latents[i]) and torch.equal(path.at(sigma * (1 + 1e-6)), latents[i])
    torch.testing.assert_close(path.at(2.5), (latents[1] + latents[2]) / 2)
    torch.testing.assert_close(path.at(10.0), latents[0] + 0.5 * (latents[0] - latents[1]))
    for sigma, i in ((8.0, 0), (6.0, 0), (4.0, 1), (2.0, 1), (1.0, 2), (0.5, 2)):
        # Euler from sigma on with this estimate arrives at the next of the grid.
        x, low = path.at(sigma), path.sigmas[i + 1]
        step = x + (low - sigma) * (x - path.denoised(sigma)) / sigma
        torch.testing.assert_close(step, latents[i + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(path.denoised(0.7), latents[3])


def test_the_config_refuses_what_does_nothing():
    for settings in ({"method": "magic"}, {"iterations": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            InversionConfig(**settings)
    with pytest.raises(ValueError, match="threshold"):
        MaskConfig(threshold=1.5)
    assert Noise_EmptyNoise().seed == InvertedNoise.seed


def test_another_models_text_is_refused_by_name():
    ((_, options),) = prompt()
    with pytest.raises(ValueError, match="^positive encodes texts in 24 channels and the model reads 16"):
        inverted(tiny_model.picture(), positive=[[torch.zeros(1, 8, 24), options]])
