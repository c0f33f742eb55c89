"""The two nodes in ComfyUI itself, with tiny real models: every sampler and scheduler, flow, video, masks."""

import asyncio
import copy
import dataclasses

import comfy.conds
import comfy.latent_formats
import comfy.model_sampling
import comfy.nested_tensor
import comfy.samplers
import numpy as np
import pytest
import torch
from pack.kernels import spectral_guidance
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler, UnderstudyStepwisePrompt
from support import tiny_model

MODEL = tiny_model.picture()
FLOW = tiny_model.picture(flow=True)


def latent(seed, *shape):
    return {"samples": torch.randn(shape or (1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))}


def guided(sampler, source=None, driving=None, **settings):
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    settings = {**dataclasses.asdict(FrequencyGuidanceConfig()), **settings}
    node = UnderstudyFrequencyGuidanceSampler
    return node.execute(sampler, source or latent(11), driving or latent(12), **settings).result[0]


def test_schemas_are_valid_and_agree_with_the_config():
    for node in (UnderstudyFrequencyGuidanceSampler, UnderstudyStepwisePrompt):
        node.GET_SCHEMA().validate()
        assert node.GET_NODE_INFO_V1()["category"] == "Understudy/Frequency guidance"
        assert all(widget.tooltip for widget in node.define_schema().inputs)
    inputs = {widget.id: widget for widget in UnderstudyFrequencyGuidanceSampler.define_schema().inputs}
    assert list(inputs)[:9] == [
        "sampler",
        "source",
        "driving",
        "amplitude_scale",
        "phase_scale",
        "phase_distance",
        "apply_to",
        "start_percent",
        "end_percent",
    ]
    for name, value in dataclasses.asdict(FrequencyGuidanceConfig()).items():
        assert inputs[name].default == value
        assert bool(inputs[name].optional) == (name not in list(inputs)[:9])
    # Workflows saved before an optional input existed run with its default.
    required = {name: inputs[name].default for name in list(inputs)[3:9]}
    sampler = comfy.samplers.sampler_object("euler")
    UnderstudyFrequencyGuidanceSampler.execute(sampler, latent(1), latent(2), **required)


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_is_guided_and_an_idle_guide_changes_no_bit(name):
    sampler = comfy.samplers.sampler_object(name)
    plain = tiny_model.sample(MODEL, sampler)
    # Wrapped all the same, but over a range without a step: the whole path, and nothing done.
    idle = guided(sampler, start_percent=0.4001, end_percent=0.4002)
    assert idle is not sampler and torch.equal(tiny_model.sample(MODEL, idle), plain)
    assert guided(sampler, amplitude_scale=0.0, phase_scale=0.0) is sampler
    result = tiny_model.sample(MODEL, guided(sampler))
    assert torch.isfinite(result).all()
    assert (result - plain).abs().max() > 1e-2 * plain.std()


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler(scheduler):
    plain = tiny_model.sample(MODEL, comfy.samplers.sampler_object("dpmpp_2m"), scheduler=scheduler)
    result = tiny_model.sample(MODEL, guided("dpmpp_2m"), scheduler=scheduler)
    assert torch.isfinite(result).all() and not torch.equal(result, plain)


def losses(result, source, driving):
    target = spectral_guidance.prepare(source["samples"], driving["samples"])
    return spectral_guidance.losses(result, target)


@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
@pytest.mark.parametrize("apply_to", ["denoised", "latent"])
@pytest.mark.parametrize("term", ["amplitude", "phase"])
def test_the_result_is_nearer_to_what_guides_it(model, apply_to, term):
    source, driving = latent(21), latent(22)
    off = {"amplitude": {"phase_scale": 0.0}, "phase": {"amplitude_scale": 0.0}}[term]
    settings = {f"{term}_scale": 0.5, "apply_to": apply_to, **off}
    plain = tiny_model.sample(model, comfy.samplers.sampler_object("ddim"), steps=6)
    result = tiny_model.sample(model, guided("ddim", source, driving, **settings), steps=6)
    before, after = (getattr(losses(v, source, driving), term).mean() for v in (plain, result))
    assert after < before


@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["eps", "flow"])
def test_all_the_way_on_the_estimate_ends_on_the_driving_phase_and_the_source_amplitude(model):
    """The last step of euler is the estimate itself, in the model's space and back."""
    source, driving = latent(31), latent(32)
    sampler = guided("euler", source, driving, amplitude_scale=1.0, phase_scale=1.0, phase_high=0.75, end_percent=1.0)
    result = tiny_model.sample(model, sampler)
    S, D = (np.fft.fft2(v["samples"].double().numpy()) for v in (source, driving))
    expected = np.fft.ifft2(np.abs(S) * np.exp(1j * np.angle(D))).real
    np.testing.assert_allclose(result.double().numpy(), expected, atol=2e-3)


def test_a_video_model_told_of_latents_without_frames(caplog):
    video = tiny_model.video()
    shape = (1, 16, 3, 8, 6)
    plain = tiny_model.sample(video, comfy.samplers.sampler_object("uni_pc"), shape=shape)
    for size in ((1, 16, 8, 6), (1, 16, 1, 8, 6), shape):
        for sampler, apply_to in (("uni_pc", "denoised"), ("euler", "latent")):
            wrapped = guided(sampler, latent(1, *size), latent(2, *size), apply_to=apply_to)
            caplog.clear()
            result = tiny_model.sample(video, wrapped, shape=shape)
            assert torch.isfinite(result).all() and not torch.allclose(result, plain)
            for name in ("source", "driving"):
                told = f"{name} has no frames, as a picture model's VAE makes it" in caplog.text
                assert told == (len(size) == 4)


class AudioVideo(torch.nn.Module):
    """A network of ComfyUI's kind for latents of video and audio: each is halved."""

    dtype = torch.float32

    def forward(self, x, t, **kwargs):
        return [0.5 * part for part in x]


@pytest.mark.parametrize("apply_to", ["denoised", "latent"])
def test_the_video_of_nested_latents_is_guided_and_the_audio_stays(apply_to):
    model = tiny_model.video()
    base = model.model
    base.diffusion_model, base.latent_format = AudioVideo(), comfy.latent_formats.MiniMaxH3AV()
    base.memory_required = lambda *_args, **_kwargs: 0
    base.extra_conds = lambda **options: {
        "latent_shapes": comfy.conds.CONDConstant(options["latent_shapes"]),
    }
    shapes = (1, 16, 3, 8, 8), (1, 8, 2, 5)
    noise, empty = (
        comfy.nested_tensor.NestedTensor([scale * latent(i, *shape)["samples"] for i, shape in enumerate(shapes)])
        for scale in (1, 0)
    )
    sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, "simple", 3)
    results = []
    for sampler in (
        comfy.samplers.sampler_object("euler"),
        guided("euler", latent(11, *shapes[0]), latent(12, *shapes[0]), apply_to=apply_to, phase_scale=0.5),
    ):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(tiny_model.conditioning(1), tiny_model.conditioning(2))
        results.append(guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=1).unbind())
    (video, audio), (guided_video, guided_audio) = results
    assert torch.equal(audio, guided_audio) and guided_video.shape == shapes[0]
    assert torch.isfinite(guided_video).all() and not torch.allclose(video, guided_video)


def test_batches_bf16_models_masks_and_previews():
    steps = []
    mask = torch.ones(3, 1, 8, 8)
    mask[..., :3] = 0
    start = latent(5, 3, 4, 8, 8)["samples"]
    source = {**latent(1, 3, 4, 8, 8), "noise_mask": torch.ones(3, 64, 64), "batch_index": [4, 5, 6]}
    result = tiny_model.sample(
        tiny_model.picture(dtype=torch.bfloat16),
        guided("dpmpp_sde", source),
        shape=(3, 4, 8, 8),
        latent=start,
        denoise_mask=mask,
        callback=lambda step, estimate, x, total: steps.append((step, total)),
    )
    assert torch.isfinite(result).all() and steps == [(i, 4) for i in range(4)]
    torch.testing.assert_close(result[..., :3], start[..., :3], rtol=1e-2, atol=1e-2)


def test_each_of_a_batch_is_as_if_alone():
    source, driving = latent(1, 2, 4, 8, 8), latent(2, 2, 4, 8, 8)
    together = tiny_model.sample(MODEL, guided("heun", source, driving), shape=(2, 4, 8, 8))
    first = {"samples": source["samples"][:1]}, {"samples": driving["samples"][:1]}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise[:1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    alone = tiny_model.sample(MODEL, guided("heun", *first), shape=(1, 4, 8, 8))
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-2)


def test_prompts_share_nothing_and_the_callers_objects_stay():
    sampler = comfy.samplers.sampler_object("dpmpp_2m")
    source, driving = latent(1), latent(2)
    before = copy.deepcopy((MODEL.model_options, vars(sampler), source, driving))
    plain = tiny_model.sample(MODEL, sampler)
    wrapped = guided(sampler, source, driving)
    twice = guided(wrapped, source, driving)
    results = [tiny_model.sample(MODEL, wrapped) for _ in range(2)]
    assert torch.equal(*results)
    assert not torch.equal(tiny_model.sample(MODEL, twice), results[0])
    # Another size and another model, through the same SAMPLER object.
    assert torch.isfinite(tiny_model.sample(FLOW, wrapped)).all()
    with pytest.raises(ValueError, match="resize source to 64 x 96 pixels"):
        tiny_model.sample(MODEL, wrapped, shape=(1, 4, 12, 8))
    assert torch.equal(tiny_model.sample(MODEL, wrapped), results[0])
    assert torch.equal(tiny_model.sample(MODEL, sampler), plain)
    after = (MODEL.model_options, vars(sampler), source, driving)
    assert after[:2] == before[:2]
    assert all(torch.equal(a["samples"], b["samples"]) for a, b in zip(after[2:], before[2:], strict=True))


def test_errors_reach_the_user_from_the_node():
    with pytest.raises(ValueError, match="latent of sampler dpmpp_2m cannot be guided"):
        guided("dpmpp_2m", apply_to="latent")
    with pytest.raises(ValueError, match="source is all zero"):
        guided("euler", source={"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="driving has 16 channels"):
        tiny_model.sample(MODEL, guided("euler", driving=latent(1, 1, 16, 8, 8)))


def test_runs_as_comfyui_runs_it():
    node = UnderstudyFrequencyGuidanceSampler
    settings = dataclasses.asdict(FrequencyGuidanceConfig())
    sampler = comfy.samplers.sampler_object("euler")
    output = node.EXECUTE_NORMALIZED(sampler=sampler, source=latent(1), driving=latent(2), **settings)
    assert isinstance(output.result[0], comfy.samplers.Sampler)
    assert not asyncio.iscoroutinefunction(node.execute)


def prompts_at(patcher, conditioning, sigmas):
    """Which prompts the model is asked with at each sigma, by the first number of their tokens."""
    asked = []

    def answer(apply_model, args):
        asked.append(sorted(set(args["c"]["c_crossattn"][:, 0, 0].tolist())))
        return torch.zeros_like(args["input"])

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(answer)
    tiny_model.sample(
        patcher, comfy.samplers.sampler_object("euler"), sigmas=sigmas, positive=conditioning, cfg=1.0
    )
    return asked


def prompt(value):
    return [[torch.full((1, 4, tiny_model.CONTEXT), value), {}]]


def with_sampling(patcher, sampling, kind, **parameters):
    class Sampling(sampling, kind):
        pass

    model_sampling = Sampling(patcher.model.model_config)
    if parameters:
        model_sampling.set_parameters(**parameters)
    patcher = patcher.clone()
    patcher.add_object_patch("model_sampling", model_sampling)
    return patcher


SAMPLINGS = {
    "discrete": MODEL,
    "flow": with_sampling(
        FLOW, comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST, shift=1.0
    ),
    "flow, shift 3": with_sampling(
        FLOW, comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST, shift=3.0
    ),
    "edm": with_sampling(
        MODEL,
        comfy.model_sampling.ModelSamplingContinuousEDM,
        comfy.model_sampling.EDM,
        sigma_min=0.002,
        sigma_max=120.0,
        sigma_data=1.0,
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("percent", [0.1, 0.12, 0.333, 0.5, 0.9])
def test_exactly_one_prompt_at_any_sigma_near_the_switch(sampling, percent):
    patcher = SAMPLINGS[sampling]
    switched = UnderstudyStepwisePrompt.execute(target=prompt(2.0), driving=prompt(1.0), switch_percent=percent)
    conditioning = switched.result[0]
    model_sampling = patcher.get_model_object("model_sampling")
    limits = {o[key] for _, o in conditioning for key in ("start_percent", "end_percent")} - {0.0, 1.0}
    assert len(limits) == 2
    sigmas = set()
    for limit in limits:
        middle = np.float32(model_sampling.percent_to_sigma(limit))
        below = above = middle
        for _ in range(12):
            sigmas |= {below, above}
            below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(np.inf))
    span = sorted(np.float32(model_sampling.percent_to_sigma(limit)) for limit in limits)
    sigmas |= set(np.linspace(span[0], span[1], 9, dtype=np.float32))
    grid = torch.tensor(sorted(sigmas, reverse=True) + [0.0])
    asked = prompts_at(patcher, conditioning, grid)
    assert len(asked) == len(grid) - 1
    assert all(values in ([1.0], [2.0]) for values in asked)
    assert asked == sorted(asked) and [1.0] in asked and [2.0] in asked


@pytest.mark.parametrize(
    ("sampling", "scheduler", "steps", "percent", "first"),
    [
        ("flow", "simple", 20, 0.4, 8),
        ("flow, shift 3", "simple", 10, 0.3, 3),
        ("flow", "sgm_uniform", 5, 0.2, 1),
        ("discrete", "normal", 11, 0.1, 1),
        ("discrete", "sgm_uniform", 50, 0.12, 6),
        ("discrete", "ddim_uniform", 50, 0.12, 6),
    ],
)
def test_the_first_k_of_n_steps_are_the_driving_prompts(sampling, scheduler, steps, percent, first):
    patcher = SAMPLINGS[sampling]
    switched = UnderstudyStepwisePrompt.execute(target=prompt(2.0), driving=prompt(1.0), switch_percent=percent)
    conditioning = switched.result[0]
    grid = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, steps)
    asked = prompts_at(patcher, conditioning, grid)
    assert asked == [[1.0]] * first + [[2.0]] * (len(grid) - 1 - first)


def test_the_switch_respects_ranges_that_are_there():
    driving = [[prompt(1.0)[0][0], {"end_percent": 0.2}], [prompt(3.0)[0][0], {"start_percent": 0.2}]]
    conditioning = UnderstudyStepwisePrompt.execute(target=prompt(2.0), driving=driving, switch_percent=0.5).result[0]
    percents = [0.1, 0.3, 0.7]
    sigmas = [FLOW.get_model_object("model_sampling").percent_to_sigma(p) for p in percents]
    assert prompts_at(FLOW, conditioning, torch.tensor([*sigmas, 0.0])) == [[1.0], [3.0], [2.0]]
