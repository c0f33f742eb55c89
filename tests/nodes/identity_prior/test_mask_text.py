"""A text of its own for the masks, against calls of the model written out; fresh noise, and doubts about masks."""

import comfy.samplers
import numpy as np
import pytest
import torch
from pack.nodes.identity_prior import attention, method, sampling
from pack.nodes.identity_prior.config import BlendConfig, InversionConfig, MaskConfig
from pack.nodes.identity_prior.inversion import InvertedNoise, invert
from pack.nodes.subject_tokens import positions_by_entry
from support import tiny_model
from support.identity_edits import EDIT, FLOW, MODEL, grid, inverted, latent, prompt

WITHOUT_CLOTHES = prompt(9, columns=(3,))
UNTAGGED = tiny_model.conditioning(4)
MASKS = MaskConfig(grow=0)


def inverted_by(mask_text, model=MODEL, positive=None, kind="ddim"):
    with torch.inference_mode():
        return invert(
            model, prompt() if positive is None else positive, latent(), grid(model, 5), InversionConfig(kind, 3),
            MASKS, mask_text,
        )


def maps_at(model, latents, sigmas, text):
    """The mean map of calls of the model at each of these latents with `text` alone."""
    found = []

    def calls(run, x, _sigmas, extra_args=None, **_options):
        entries = positions_by_entry({"positive": run.inner_model.conds["positive"]})
        for at, sigma in zip(latents, sigmas, strict=True):
            recorder = attention.AttentionRecorder(entries, attention.layers_of(model), MASKS, at.shape)
            options = {**extra_args, "model_options": recorder.added_to(extra_args["model_options"])}
            run(at.to(x), x.new_full((len(at),), sigma), **options)
            found.append(recorder.heat())
        return x

    tiny_model.sample(
        attention.with_recorder(model), comfy.samplers.KSAMPLER(calls), positive=text, sigmas=grid(model, 5), cfg=1.0
    )
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("kind", ["ddim", "fixed_point", "renoise"])
@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_the_source_mask_is_by_the_mask_text_and_the_path_is_not(model, kind):
    found = inverted_by(WITHOUT_CLOTHES, model, kind=kind)
    plain = inverted_by(None, model, kind=kind)
    assert torch.equal(found.trajectory.latents, plain.trajectory.latents)
    assert not torch.equal(found.source_mask, plain.source_mask)
    path = found.trajectory
    heat = maps_at(model, path.latents[:-1], path.sigmas[:-1], WITHOUT_CLOTHES)
    assert torch.equal(found.source_mask, method.subject_mask(heat, latent()["samples"].shape[-2:], MASKS))


def test_the_positive_needs_no_subject_where_there_is_a_mask_text():
    assert inverted_by(WITHOUT_CLOTHES, positive=UNTAGGED).source_mask.any()
    with pytest.raises(ValueError, match="mask_text does not say where the subject is named"):
        inverted_by(UNTAGGED)


class Edited:
    """A run of the edit, and where the model was called."""

    def __init__(self, mask_text, positive=EDIT, model=MODEL, fresh_noise=0.0, mask=None, seed=3, steps=5):
        inversion = inverted(model, method="ddim", steps=steps)
        blend = BlendConfig(fresh_noise=fresh_noise)
        with torch.inference_mode():
            self.model = sampling.apply(model, inversion, positive, MASKS, blend, mask, mask_text)
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(positive, tiny_model.conditioning(2))
            guider.set_cfg(2.0)
            self.noise = InvertedNoise(model, inversion).generate_noise(latent())
            self.seen = []
            self.samples = guider.sample(
                self.noise, latent()["samples"], comfy.samplers.sampler_object("euler"),
                torch.tensor(inversion.trajectory.sigmas), disable_pbar=True, seed=seed,
                callback=lambda i, denoised, x, n: self.seen.append(x.clone()),
            )
        self.inversion = inversion


def test_the_edited_mask_is_by_the_mask_text():
    """The mask of the last step, from a call written out at the latent that the sampler had there."""
    run = Edited(WITHOUT_CLOTHES)
    _, edited = sampling.masks_of(run.model, run.samples)
    path, before = run.inversion.trajectory, Edited(WITHOUT_CLOTHES, steps=5)
    assert torch.equal(run.samples, before.samples)
    x, sigma = run.seen[-1], path.sigmas[-2]
    union = sampling.masks_of(run.model, run.samples)[0]
    previous = maps_at(MODEL, [run.seen[-2]], [path.sigmas[-3]], WITHOUT_CLOTHES)
    size = x.shape[-2:]
    mask = method.union(union, method.subject_mask(previous, size, MASKS))
    blended = method.blend(x, path.at(sigma), mask)
    heat = maps_at(MODEL, [blended], [sigma], WITHOUT_CLOTHES)
    assert torch.equal(edited, method.subject_mask(heat, size, MASKS))


def test_another_prompt_that_is_not_tagged_edits_by_the_mask_text():
    assert torch.isfinite(Edited(WITHOUT_CLOTHES, positive=UNTAGGED).samples).all()
    with pytest.raises(ValueError, match="positive does not say where the subject is named"):
        Edited(None, positive=UNTAGGED)


def test_fresh_noise_is_new_inside_the_mask_alone_and_as_strong():
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    half = method.fresh(noise, mask[None], 0.5, 7)
    new = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(half[..., :4], noise[..., :4])
    expected = np.sqrt(0.75) * noise.numpy() + 0.5 * new.numpy()
    np.testing.assert_allclose(half[..., 4:].numpy(), expected[..., 4:], rtol=1e-5, atol=1e-6)
    large = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(2))
    for share in (0.3, 0.7, 1.0):
        assert float(method.fresh(large, torch.ones(1, 1, 128, 128), share, 3).std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(method.fresh(noise, mask[None], 0.0, 7), noise)


def test_fresh_noise_in_a_run_changes_the_masked_part_and_follows_the_seed():
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    plain, new, other = (
        Edited(None, mask=mask, fresh_noise=share, seed=seed).samples for share, seed in ((0, 3), (0.8, 3), (0.8, 4))
    )
    source = latent()["samples"]
    for samples in (plain, new, other):
        torch.testing.assert_close(samples[..., :4], source[..., :4], rtol=1e-4, atol=1e-5)
    assert (new - plain)[..., 4:].abs().mean() > 0.05 and (new - other)[..., 4:].abs().mean() > 0.05
    again = Edited(None, mask=mask, fresh_noise=0.8, seed=3).samples
    assert torch.equal(new, again)


def test_a_flat_map_and_a_mask_of_everything_are_told_of(caplog):
    ramp = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    assert method.doubt(ramp, (ramp > 0.5).float()) == ""
    assert "nowhere more than elsewhere" in method.doubt(1 + 0.01 * ramp, (ramp > 0.5).float())
    assert method.doubt(ramp, (ramp > 0.1).float()) == "covers 89% of the picture"
    with torch.inference_mode():
        invert(
            MODEL, prompt(), latent(), grid(MODEL, 3), InversionConfig("ddim", 1), MaskConfig(threshold=0.0, grow=0)
        )
    assert "Invert Image: the source mask" in caplog.text and "connect a mask_text" in caplog.text
