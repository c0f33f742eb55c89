"""The blend under every sampler of ComfyUI, by connected masks."""

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_void import VOID_DDIM
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.frequency_guidance.method import FrequencyGuidance
from pack.nodes.identity_prior.config import BlendConfig
from pack.nodes.identity_prior.inversion import InvertedNoise
from pack.nodes.patching import samplers
from support import tiny_model
from support.identity_edits import (
    EDIT,
    FLOW,
    INVERSIONS,
    MODEL,
    SHAPE,
    blended,
    grid,
    inverted,
    latent,
    recorded_inputs,
    sample,
)

SHORT = {id(model): inverted(model, method="ddim", steps=4) for model in (MODEL, FLOW)}


def with_inverted_noise(model, sampler, inversion, callback=None, scale=1.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(EDIT, tiny_model.conditioning(2))
    guider.set_cfg(2.0)
    noise = scale * InvertedNoise(model, inversion).generate_noise(latent())
    with torch.inference_mode():
        return guider.sample(
            noise, latent()["samples"], comfy.samplers.sampler_object(sampler),
            torch.tensor(inversion.trajectory.sigmas), callback=callback, disable_pbar=True, seed=3,
        )


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_no_mask_ends_on_the_source_and_a_full_one_is_plain_sampling(model, name):
    """One batch of none, all and half; dpm_adaptive takes the steps that its whole batch needs."""
    source, inversion = latent()["samples"][0], SHORT[id(model)]
    masks = torch.ones(3, 64, 64)
    masks[0] = masks[2, :, :32] = 0
    options = {"inversion": inversion, "shape": (3, 4, 8, 8)}
    none, every, half = sample(blended(model, masks, inversion=inversion), name, model, **options)
    torch.testing.assert_close(none, source, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half[..., :4], source[..., :4], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(half).all() and (half - source)[..., 4:].abs().mean() > 0.01
    if name == "dpm_adaptive":
        full = blended(model, torch.ones(1, 64, 64), inversion=inversion)
        results = [sample(one, name, model, inversion=inversion) for one in (full, model)]
        assert torch.equal(*results)
    else:
        assert torch.equal(every, sample(model, name, model, **options)[1])


@pytest.mark.parametrize("name", ["euler", "ddim"])
@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_without_a_mask_euler_and_ddim_walk_the_inverted_path(model, name):
    """At any guidance and with another prompt than the inversion's."""
    inversion, seen = INVERSIONS[id(model)], []
    patched = blended(model, torch.zeros(1, 8, 8))
    with_inverted_noise(patched, name, inversion, lambda i, d, x, n: seen.append(x.clone()))
    assert len(seen) == len(inversion.trajectory.latents) - 1
    for x, stored in zip(seen, inversion.trajectory.latents, strict=False):
        torch.testing.assert_close(x, stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "uni_pc", "dpm_adaptive", "lcm"])
def test_the_model_sees_the_path_outside_the_mask_on_the_grid_and_off_it(name):
    mask = torch.ones(1, 8, 8)
    mask[..., :4] = 0
    sigmas = INVERSIONS[id(MODEL)].trajectory.sigmas
    latents = INVERSIONS[id(MODEL)].trajectory.latents
    off_grid = 0
    for sigma, x in recorded_inputs(MODEL, blended(mask=mask), name):
        high = max(i for i, known in enumerate(sigmas[:-1]) if known >= sigma * (1 - 1e-3) or i == 0)
        share = (sigma - sigmas[high + 1]) / (sigmas[high] - sigmas[high + 1])
        expected = share * latents[high] + (1 - share) * latents[high + 1]
        torch.testing.assert_close(x[..., :4], expected[..., :4], rtol=2e-3, atol=2e-3)
        off_grid += not 1 - 1e-3 < share < 1 + 1e-3 and share > 1e-3
    assert (off_grid > 0) == (name in ("dpm_2", "dpmpp_sde", "dpm_adaptive"))


@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_a_noise_that_is_not_the_picture_s_is_told_of(model, caplog):
    inversion = INVERSIONS[id(model)]
    patched = blended(model, torch.zeros(1, 8, 8))
    for scale in (0.0, 1.0, 1.05):
        with_inverted_noise(patched, "euler", inversion, scale=scale)
    sample(patched, "euler", model, sigmas=torch.tensor(inversion.trajectory.sigmas[2:]))
    assert not caplog.records
    sample(patched, "euler", model)
    with_inverted_noise(patched, "euler", inversion, scale=1.2)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.text.count("noise is not Invert Image's") == 2


def test_a_lora_that_the_inversion_did_not_have_is_told_of(caplog):
    mask = torch.ones(1, 8, 8)
    blended(MODEL.clone(), mask, INVERSIONS[id(MODEL)])
    assert not caplog.records
    other = MODEL.clone()
    key, weight = next(iter(other.model_state_dict().items()))
    other.add_patches({key: ("diff", (torch.zeros_like(weight),))})
    blended(other, mask, INVERSIONS[id(MODEL)])
    assert "Identity Mask Blend: model has other weights than the one that the picture was inverted" in caplog.text


def test_a_mask_fades_between_the_edit_and_the_path():
    """Euler's last step is the estimate itself: half of it and half of the source."""
    grid_of_one = torch.tensor([5.0, 0.0])
    inversion = inverted(MODEL, sigmas=grid_of_one)
    soft = with_inverted_noise(blended(mask=torch.full((1, 8, 8), 0.5), inversion=inversion), "euler", inversion)
    plain = with_inverted_noise(MODEL, "euler", inversion)
    torch.testing.assert_close(soft, 0.5 * plain + 0.5 * latent()["samples"], rtol=1e-3, atol=1e-3)


def test_the_blend_acts_in_its_part_of_the_schedule_only():
    nothing = torch.zeros(1, 8, 8)
    plain, source = sample(MODEL), latent()["samples"]
    assert torch.equal(sample(blended(mask=nothing, start=0.30001, end=0.30002)), plain)
    early = sample(blended(mask=nothing, end=0.5))
    assert not torch.allclose(early, source, atol=0.05) and not torch.allclose(early, plain, atol=0.05)
    torch.testing.assert_close(sample(blended(mask=nothing, start=0.5)), source, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="range of steps is empty"):
        BlendConfig(0.5, 0.5)


def test_a_run_over_a_part_of_the_grid_stays_on_the_path():
    for model in (MODEL, FLOW):
        inversion = INVERSIONS[id(model)]
        part = torch.tensor(inversion.trajectory.sigmas[:4])
        result = sample(blended(model, torch.zeros(1, 8, 8)), "dpmpp_2m", model, sigmas=part)
        x = model.get_model_object("model_sampling").inverse_noise_scaling(part[-1], inversion.trajectory.latents[3])
        torch.testing.assert_close(result, model.model.process_latent_out(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigmas", [[9.0, 2.0, 0.0], grid(MODEL, 5).tolist(), grid(MODEL, 6, "karras").tolist()])
def test_other_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match="connect the same SIGMAS"):
        sample(blended(mask=torch.ones(1, 8, 8)), sigmas=torch.tensor(sigmas))


def test_a_grid_that_differs_in_its_middle_says_where():
    """KSampler leaves out a sigma for uni_pc and dpm_2: as many, from and to the same, and others between."""
    whole = grid(MODEL, 7).tolist()
    sigmas = [*whole[:-2], whole[-1]]
    inversion = inverted(MODEL, steps=6)
    with pytest.raises(ValueError, match=rf"7 sigmas .* on 7 .*; sigma 2 is {sigmas[1]:.4g} and was .*KSampler"):
        sample(blended(mask=torch.ones(1, 8, 8), inversion=inversion), sigmas=torch.tensor(sigmas))


class Resizing:
    """A sampler function that asks for another size."""

    __name__ = "sample_resizing"

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        return model(torch.cat([x, x], -1), sigmas[:1].expand(len(x)), **extra_args)


def test_samplers_that_cannot_be_followed_are_refused_by_name():
    with pytest.raises(ValueError, match="VOID_DDIM"):
        sample(blended(mask=torch.ones(1, 8, 8)), VOID_DDIM())
    with pytest.raises(ValueError, match="resizing changed the latent"):
        sample(blended(mask=torch.ones(1, 8, 8)), comfy.samplers.KSAMPLER(Resizing()))


def test_wrapped_samplers_latent_masks_and_other_guiders_end_on_the_source():
    source = latent()["samples"]
    patched = blended(mask=torch.zeros(1, 8, 8))
    guidance = FrequencyGuidance(latent(7)["samples"], latent(8)["samples"], FrequencyGuidanceConfig(end_percent=1.0))
    guided = samplers.guide_denoised(comfy.samplers.sampler_object("euler"), guidance.begin)
    torch.testing.assert_close(sample(patched, guided), source, rtol=1e-4, atol=1e-5)
    denoise_mask = torch.zeros(1, 1, 8, 8)
    denoise_mask[..., :2] = 1
    result = sample(patched, "ddim", latent=latent(9)["samples"], denoise_mask=denoise_mask)
    torch.testing.assert_close(result, source, rtol=1e-4, atol=1e-5)
    guider = Guider_DualCFG(patched)
    guider.set_conds(EDIT, tiny_model.conditioning(4), tiny_model.conditioning(2))
    guider.set_cfg(3.0, 2.0)
    with torch.inference_mode():
        result = guider.sample(
            torch.randn(SHAPE), torch.zeros(SHAPE), comfy.samplers.sampler_object("dpmpp_2m"),
            torch.tensor(INVERSIONS[id(MODEL)].trajectory.sigmas), disable_pbar=True, seed=1,
        )
    torch.testing.assert_close(result, source, rtol=1e-4, atol=1e-5)


def test_batches_of_one_source_and_of_many():
    zero = torch.zeros(1, 8, 8)
    three = sample(blended(mask=zero), shape=(3, 4, 8, 8))
    torch.testing.assert_close(three, latent()["samples"].expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)
    pair = {"samples": torch.cat([latent(1)["samples"], latent(2)["samples"]])}
    inversion = inverted(MODEL, source=pair)
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    result = sample(blended(mask=masks, inversion=inversion), inversion=inversion, shape=(2, 4, 8, 8))
    plain = sample(MODEL, inversion=inversion, shape=(2, 4, 8, 8))
    torch.testing.assert_close(result[0], pair["samples"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[1], plain[1], rtol=1e-4, atol=1e-5)
    edit = sample(blended(inversion=inversion), inversion=inversion, shape=(2, 4, 8, 8))
    assert torch.isfinite(edit).all()
    with pytest.raises(ValueError, match="the batch is 1: connect one mask$"):
        sample(blended(mask=masks))
    with pytest.raises(ValueError, match="one for each of the batch"):
        sample(blended(mask=zero, inversion=inversion), inversion=inversion, shape=(3, 4, 8, 8))
    with pytest.raises(ValueError, match="size of the inverted picture"):
        sample(blended(mask=zero), shape=(1, 4, 8, 6))
    with pytest.raises(ValueError, match="mask holds 3 masks"):
        sample(blended(mask=torch.zeros(3, 8, 8)), shape=(2, 4, 8, 8))
    with pytest.raises(ValueError, match="mask holds 3 masks"):
        blended(mask=torch.zeros(3, 8, 8), inversion=inversion)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (5, 3), (100, 77)])
def test_masks_of_any_size_keep_their_zeros_and_ones(size):
    assert torch.equal(sample(blended(mask=torch.ones(1, *size))), sample(MODEL))
    torch.testing.assert_close(
        sample(blended(mask=torch.zeros(1, *size))), latent()["samples"], rtol=1e-4, atol=1e-5
    )
