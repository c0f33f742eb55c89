"""FlowEdit's path, against its published loop with the model's calls written out."""

import comfy.samplers
import pytest
import torch
from pack.nodes.identity_prior import sampling
from pack.nodes.identity_prior.config import FLOW_EDIT, BlendConfig, InversionConfig, MaskConfig
from pack.nodes.identity_prior.inversion import InvertedNoise, invert
from support import tiny_model
from support.identity_edits import FLOW, MODEL, grid, latent, prompt

STEPS = 5
# The small models hardly listen to prompts of a usual size.
SOURCE, EDIT = ([[40 * tensor, options] for tensor, options in prompt(seed)] for seed in (1, 5))


def path_of(model, seed=7, **masks):
    with torch.inference_mode():
        config = InversionConfig(path=FLOW_EDIT, seed=seed)
        return invert(model, SOURCE, latent(), grid(model, STEPS), config, MaskConfig(grow=0, **masks))


def estimate(model, x, sigma, text):
    """The model's denoised estimate of x at sigma with `text` alone."""
    found = []

    def call(run, start, _sigmas, extra_args=None, **_options):
        found.append(run(x.to(start), start.new_full((len(x),), sigma), **extra_args))
        return start

    tiny_model.sample(model, comfy.samplers.KSAMPLER(call), positive=text, sigmas=grid(model, STEPS), cfg=1.0)
    return found[0]


def edited(model, inversion, text=EDIT, mask=None, sampler="euler", cfg=1.0):
    mask = torch.ones(1, 8, 8) if mask is None else mask
    with torch.inference_mode():
        patched = sampling.apply(model, inversion, text, MaskConfig(grow=0), BlendConfig(), mask)
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(text, tiny_model.conditioning(2))
        guider.set_cfg(cfg)
        noise = InvertedNoise(model, inversion).generate_noise(latent())
        return guider.sample(
            noise, latent()["samples"], comfy.samplers.sampler_object(sampler),
            torch.tensor(inversion.trajectory.sigmas), disable_pbar=True, seed=3,
        )


def published(model, sigmas, seed=7):
    """Kulikov et al. 2024, algorithm 1, with n_avg 1 and one noise for all steps: only the edited picture moves."""
    source = model.model.process_latent_in(latent()["samples"])
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed))
    z = source.clone()
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        source_now = (1 - now) * source + now * noise
        target_now = z + source_now - source
        velocities = [
            (x - estimate(model, x, now, text)) / now for x, text in ((target_now, EDIT), (source_now, SOURCE))
        ]
        z = z + (after - now) * (velocities[0] - velocities[1])
    return model.model.process_latent_out(z)


def test_euler_makes_what_the_published_loop_makes():
    inversion = path_of(FLOW)
    expected = published(FLOW, inversion.trajectory.sigmas)
    result = edited(FLOW, inversion)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result - latent()["samples"]).abs().mean() > 0.01


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("model", [FLOW, MODEL], ids=["flow", "eps"])
def test_the_source_prompt_gives_the_picture_back(model, sampler):
    result = edited(model, path_of(model), text=SOURCE, sampler=sampler)
    torch.testing.assert_close(result, latent()["samples"], rtol=2e-3, atol=2e-3)


def test_what_is_outside_the_mask_is_the_picture():
    mask = torch.ones(1, 8, 8)
    mask[..., :4] = 0
    result, source = edited(FLOW, path_of(FLOW), mask=mask, cfg=3.0), latent()["samples"]
    torch.testing.assert_close(result[..., :4], source[..., :4], rtol=1e-4, atol=1e-5)
    assert (result - source)[..., 4:].abs().mean() > 0.02


def test_the_path_is_a_straight_one_of_its_seed():
    path = path_of(FLOW).trajectory
    clean = FLOW.model.process_latent_in(latent()["samples"])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    for sigma, x in zip(path.sigmas, path.latents, strict=True):
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise, rtol=1e-5, atol=1e-5)
    assert len(path.corrections) == STEPS
    assert not torch.equal(path.latents[0], path_of(FLOW, seed=8).trajectory.latents[0])
    torch.testing.assert_close(
        path.corrections[2], clean - estimate(FLOW, path.latents[2], path.sigmas[2], SOURCE), rtol=1e-4, atol=1e-5
    )


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="path is 'straight'"):
        InversionConfig(path="straight")
