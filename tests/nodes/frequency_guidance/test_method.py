"""What frequency guidance accepts, where it acts, and the prompt switch; no ComfyUI in this file."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack.kernels import spectral_guidance
from pack.nodes.frequency_guidance import method
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig

# A model with latents of its own scale, and sigma running from 10 to 0 over sampling.
MODEL = types.SimpleNamespace(
    process_latent_in=lambda latent: latent * 0.5,
    model_sampling=types.SimpleNamespace(percent_to_sigma=lambda percent: 10.0 * (1 - percent)),
    latent_format=types.SimpleNamespace(spacial_downscale_ratio=8),
)


def everywhere(**settings) -> FrequencyGuidanceConfig:
    """Settings of a guide that acts in all bands and steps, where a test does not say otherwise."""
    return FrequencyGuidanceConfig(**{"phase_scale": 0.3, "phase_high": 0.75, "end_percent": 1.0, **settings})


FULL = everywhere(amplitude_scale=1.0, phase_scale=1.0)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def begin(source, driving, shape, config=FULL):
    return method.FrequencyGuidance(source, driving, config).begin(MODEL, torch.Size(shape))


def test_guides_in_the_space_of_the_model():
    source, driving, x = noise(1, 1, 4, 6, 8), noise(2, 1, 4, 6, 8), noise(3, 2, 4, 6, 8)
    guided = begin(source, driving, x.shape)(x, 5.0)
    S, D = (torch.fft.fft2(v.double()) for v in (0.5 * source, driving))
    expected = torch.fft.ifft2(S.abs() * torch.exp(1j * D.angle())).real
    torch.testing.assert_close(guided, expected.float().expand(2, -1, -1, -1), rtol=0, atol=1e-5)


def test_one_latent_serves_the_batch_and_n_latents_serve_one_each():
    x, source, driving = noise(1, 3, 4, 5, 5), noise(2, 3, 4, 5, 5), noise(3, 3, 4, 5, 5)
    config = everywhere(amplitude_scale=0.4, phase_scale=0.6)
    together = begin(source, driving, x.shape, config)(x, 5.0)
    for i in range(3):
        alone = begin(source[i : i + 1], driving[i : i + 1], (1, 4, 5, 5), config)(x[i : i + 1], 5.0)
        torch.testing.assert_close(together[i : i + 1], alone)
    mixed = begin(source[:1], driving, x.shape, config)(x, 5.0)
    torch.testing.assert_close(mixed[0], together[0])
    assert not torch.allclose(mixed[1], together[1])


def test_a_picture_guides_every_frame_of_a_video():
    x, picture = noise(1, 1, 16, 3, 6, 4), noise(2, 1, 16, 6, 4)
    guided = begin(picture, picture, x.shape)(x, 5.0)
    torch.testing.assert_close(
        guided, (0.5 * picture)[:, :, None].expand(-1, -1, 3, -1, -1), rtol=0, atol=1e-5
    )
    begin(noise(3, 1, 16, 3, 6, 4), picture[:, :, None], x.shape)(x, 5.0)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 11))
def test_acts_where_start_is_at_least_sigma_and_sigma_is_above_end(start, end, sigma):
    x, other = noise(1, 1, 4, 4, 4), noise(2, 1, 4, 4, 4)
    if not start < end:
        with pytest.raises(ValueError, match="start_percent"):
            everywhere(start_percent=start, end_percent=end)
        return
    limits = (10 * (1 - start), 10 * (1 - end))
    if any(abs(sigma - limit) < 1e-3 * limit for limit in limits):
        return
    guide = begin(other, other, x.shape, everywhere(start_percent=start, end_percent=end))
    assert (guide(x, sigma) is not x) == (limits[0] >= sigma > limits[1])


@pytest.mark.parametrize("rounding", [1 - 2e-7, 1.0, 1 + 2e-7])
def test_a_step_on_a_limit_is_on_it_whatever_its_rounding(rounding):
    x, other = noise(1, 1, 4, 4, 4), noise(2, 1, 4, 4, 4)
    guide = begin(other, other, x.shape, everywhere(start_percent=0.3, end_percent=0.6))
    assert guide(x, 7.0 * rounding) is not x
    assert guide(x, 4.0 * rounding) is x
    whole = begin(other, other, x.shape)
    assert whole(x, 10.0 * rounding) is not x and whole(x, 0.0) is x


def test_the_target_is_prepared_once_a_run_and_runs_share_nothing(monkeypatch):
    prepared = []
    prepare = spectral_guidance.prepare
    monkeypatch.setattr(spectral_guidance, "prepare", lambda *a, **k: prepared.append(a) or prepare(*a, **k))
    source, x = noise(1, 1, 4, 4, 4), noise(2, 1, 4, 4, 4)
    before = source.clone()
    guidance = method.FrequencyGuidance(source, source, FULL)
    for run in (1, 2):
        guide = guidance.begin(MODEL, x.shape)
        first = guide(x, 5.0)
        assert torch.equal(guide(x, 4.0), first) and len(prepared) == run
    assert torch.equal(source, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype_of_the_estimate(dtype):
    x = noise(1, 1, 4, 4, 4).to(dtype)
    assert begin(noise(2, 1, 4, 4, 4).half(), noise(3, 1, 4, 4, 4), x.shape)(x, 5.0).dtype == dtype


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.ones(0, 4, 8, 8), "empty batch"),
        (torch.zeros(1, 4, 8, 8), "all zero"),
        (torch.full((1, 4, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 4, 8, 8), float("inf")), "infinite"),
        (torch.ones(1, 64, 100), "not an image or video latent"),
    ],
)
def test_refuses_latents_that_cannot_guide(latent, message):
    good = noise(1, 1, 4, 8, 8)
    for name, pair in (("source", (latent, good)), ("driving", (good, latent))):
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            method.FrequencyGuidance(*pair, FULL)
    # A term that is off does not look at its latent.
    off = everywhere(amplitude_scale=0.0, phase_scale=0.5)
    method.FrequencyGuidance(latent, good, off)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((1, 4, 8, 8), (1, 4, 16, 24), "resize driving to 192 x 128 pixels"),
        ((1, 16, 8, 8), (1, 4, 8, 8), "driving has 16 channels .* have 4: encode it with the VAE of this model"),
        ((3, 4, 8, 8), (2, 4, 8, 8), "holds 3 latents and the batch is 2: connect one latent, or 2"),
        ((3, 4, 8, 8), (1, 4, 8, 8), "holds 3 latents and the batch is 1: connect one latent$"),
        ((1, 4, 5, 8, 8), (1, 4, 9, 8, 8), "5 latent frames and the sampled video has 9"),
        ((1, 4, 5, 8, 8), (1, 4, 8, 8), "encode one frame"),
        ((1, 4, 8, 8), (1, 1, 5000), "cannot steer audio or packed"),
    ],
)
def test_errors_for_latents_that_do_not_fit_name_the_fix(shape, target, message):
    config = everywhere(amplitude_scale=0.0, phase_scale=0.5)
    with pytest.raises(ValueError, match=message):
        begin(noise(1, 1, 4, 8, 8), noise(2, *shape), target, config)


def test_a_sampler_that_changes_the_size_is_named():
    guide = begin(noise(1, 1, 4, 8, 8), noise(2, 1, 4, 8, 8), (1, 4, 8, 8))
    with pytest.raises(ValueError, match="sampler that keeps the size"):
        guide(noise(3, 1, 4, 16, 16), 5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phase_scale": 1.5}, "phase_scale is 1.5: use 0"),
        ({"amplitude_scale": float("nan")}, "amplitude_scale"),
        ({"phase_distance": "angle"}, "circular, paper"),
        ({"apply_to": "noise"}, "denoised, latent"),
        ({"update": "adam"}, "per_bin, gradient"),
        ({"phase_low": 0.5, "phase_high": 0.3}, "phase band is empty"),
        ({"amplitude_low": 0.5, "amplitude_high": 0.5}, "amplitude band is empty"),
    ],
)
def test_settings_that_hold_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        everywhere(**settings)


def test_paper_with_gradient_is_the_published_step():
    x, d = noise(1, 1, 4, 6, 6), noise(2, 1, 4, 6, 6)
    config = everywhere(amplitude_scale=0.0, phase_scale=0.1, phase_distance="paper", update="gradient")
    leaf = x.double().requires_grad_()
    angles = [torch.fft.fft2(v).angle().abs() for v in (leaf, d.double())]
    slope = torch.autograd.grad(((angles[0] - angles[1]) ** 2).mean(), leaf)[0].float()
    step = begin(d, d, x.shape, config)(x, 5.0) - x
    # One rate per plane, so each plane's step is parallel to the published gradient, downhill.
    cosine = torch.nn.functional.cosine_similarity(step.flatten(2), slope.flatten(2), dim=-1)
    torch.testing.assert_close(cosine, -torch.ones_like(cosine), rtol=0, atol=1e-4)


def test_the_pair_takes_turns_and_shares_noise_and_level_in_each_iteration():
    seen = []

    def loss(batch, generator):
        seen.append((batch[0].latent, batch[0].conditions, float(torch.rand(1, generator=generator))))
        return torch.tensor([1.0, 3.0])

    samples = [types.SimpleNamespace(latent=name, conditions=f"{name} text") for name in ("source", "driving")]
    objective = method.SourceDrivingObjective(loss, samples, seed=4)
    assert [float(objective(step, torch.Generator().manual_seed(step))) for step in range(6)] == [2.0] * 6
    assert [latent for latent, _, _ in seen] == ["source", "driving"] * 3
    assert all(text == f"{latent} text" for latent, text, _ in seen)
    numbers = [number for _, _, number in seen]
    assert numbers[0::2] == numbers[1::2] and len(set(numbers)) == 3
    seen.clear()
    method.SourceDrivingObjective(loss, samples, seed=5)(0, torch.Generator())
    assert seen[0][2] != numbers[0]


def entry(**options):
    return [torch.zeros(1, 2, 3), options]


def test_switch_leaves_its_inputs_alone_and_keeps_what_they_hold():
    driving, target = [entry(strength=0.5), entry(area=(1, 2, 3, 4))], [entry(pooled_output=7)]
    switched = method.switch_prompt(driving, target, 0.4)
    assert driving[0][1] == {"strength": 0.5} and target[0][1] == {"pooled_output": 7}
    assert [options.get("strength") for _, options in switched] == [0.5, None, None, None]
    assert switched[2][1]["pooled_output"] == switched[3][1]["pooled_output"] == 7
    assert switched[0][0] is driving[0][0]
    assert method.switch_prompt(driving, target, 0.0) == target
    assert method.switch_prompt(driving, target, 1.0) == driving


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_switch_cuts_ranges_and_never_widens_them(switch, first, last):
    first, last = sorted((first, last))
    driving, target = [entry(name="d", start_percent=first, end_percent=last)], [entry(name="t")]
    for pair, name in (((driving, target), "d"), ((target, driving), "t")):
        parts = [o for _, o in method.switch_prompt(*pair, switch) if o["name"] == "d"]
        assert all(first <= o["start_percent"] <= o["end_percent"] <= last for o in parts)
        lone = [o for o in parts if not o.get("default")]
        assert len(lone) <= 1
        if name == "d" and lone and 0.001 < switch < 1:
            assert lone[0]["end_percent"] == min(last, lone[0]["end_percent"]) < switch
