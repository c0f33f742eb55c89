"""ComfyUI's Wan models, tiny, with references: against the published formulas, cached and interrupted."""

import threading

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from pack.nodes.patching import models
from pack.nodes.video_identity import method, reference_pass, sampling
from support import published_wan, tiny_model
from support.video_identities import (
    ADAPTER,
    MODEL,
    SHAPE,
    call,
    call_loaded,
    draw,
    lora,
    person,
    picture_latent,
    published,
    relative,
    sample,
    shown,
    weighed,
)

# Parity


@pytest.mark.parametrize(("shape", "size"), [
    ((1, 16, 3, 8, 6), (6, 4)), ((2, 16, 1, 4, 4), (4, 4)), ((1, 16, 2, 2, 10), (2, 8)), ((3, 16, 2, 6, 4), (8, 8)),
])
def test_the_model_with_a_reference_is_the_published_model(shape, size):
    """5e-6 of fp32 rounding separate ComfyUI's plain model from the same formulas in fp64."""
    x = draw(2, *shape)
    assert relative(call(MODEL, x), published(x, None)) < 1e-5
    with_reference = call(shown(latent=picture_latent(1, *size)), x)
    assert relative(with_reference, published(x, picture_latent(1, *size))) < 1e-5
    assert relative(with_reference, call(MODEL, x)) > 0.02


def test_a_sampling_run_is_the_published_one():
    result = sample(shown(), cfg=1.0, positive=tiny_model.conditioning(9))
    base = MODEL.model
    grid = comfy.samplers.calculate_sigmas(base.model_sampling, "simple", 3).double()
    wan = published_wan.Wan(base.diffusion_model.state_dict(), 2, 32, ADAPTER.tensors())
    latent = base.process_latent_in(picture_latent())
    x = draw(3, *SHAPE).double()
    context = tiny_model.conditioning(9)[0][0]
    for sigma, after in zip(grid[:-1], grid[1:], strict=True):
        # Every token of the reference passes every block again in every step: nothing is cached here.
        x = x + (after - sigma) * wan(x, base.model_sampling.timestep(sigma[None]), context, latent)
    assert relative(result, base.process_latent_out(x)) < 1e-5


@pytest.mark.parametrize(("shape", "told"), [((3, 1), True), ((1, 1), False), ((2, 2), False)])
def test_a_batch_of_pictures_is_no_video_and_the_node_says_so(shape, told, caplog):
    caplog.set_level("INFO")
    size = (shape[0], 16, shape[1], 4, 4)
    assert sample(shown(), shape=size, steps=1).shape == size
    note = f"the latents hold {shape[0]} pictures and no video, so each is made by itself"
    assert (note in caplog.text) == told


@pytest.mark.parametrize(("size", "told"), [((6, 4), ""), ((8, 6), ""), ((8, 8), "2.7 times as large as a frame")])
def test_a_reference_much_larger_than_the_video_is_told(size, told, caplog):
    """Beside frames of 6 x 4."""
    sample(shown(latent=picture_latent(1, *size)), shape=(1, 16, 2, 6, 4), steps=1)
    assert told in caplog.text and ("times as large" in caplog.text) == bool(told)


def test_positions_of_the_reference(monkeypatch):
    seen = []
    embedder = MODEL.model.diffusion_model.rope_embedder
    handle = embedder.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    try:
        call(shown(), draw(2, *SHAPE))
        call(shown(), draw(2, 1, 16, 3, 7, 5))  # padded to 8 x 6
        call(shown(), draw(2, *SHAPE), options={"rope_options": {"shift_t": 2.0, "scale_y": 3.0, "shift_x": 0.5}})
    finally:
        handle.remove()
    references = [ids for ids in seen if ids.shape[1] == 6]
    assert len(references) == 3
    expected = [[-1.0, 4.0 + h, 3.0 + w] for h in range(3) for w in range(2)]
    assert references[0][0].tolist() == expected == references[1][0].tolist()
    # Stretched rows end at 9, so the reference begins at 10; shifts move both alike.
    assert references[2][0, 0].tolist() == [1.0, 10.0, 3.5]


# The cache


@pytest.fixture
def passes(monkeypatch):
    """The latents of every complete pass of a reference."""
    latents, reference_kv = [], reference_pass.reference_kv

    def counted(base, adapter, latent, **settings):
        kv = reference_kv(base, adapter, latent, **settings)
        latents.append(latent)
        return kv

    monkeypatch.setattr(reference_pass, "reference_kv", counted)
    return latents


def test_the_reference_passes_once_a_run_and_the_cache_changes_no_bit(passes, monkeypatch):
    model = shown()
    result = sample(model)
    assert len(passes) == 1 and len(models.attachment(model, sampling.KEY).cache) == 0
    assert torch.equal(sample(model), result) and len(passes) == 2
    monkeypatch.setattr(sampling.ReferenceCache, "get", lambda self, owner, key, compute, *_version: compute())
    assert torch.equal(sample(model), result)
    assert len(passes) == 2 + 3  # once per step: both halves of CFG are one call


def test_split_and_batched_guidance_agree_and_share_the_reference(passes, monkeypatch):
    model = shown()
    batched = sample(model)
    free = comfy.model_management.get_free_memory
    # The sampler asks for one number, attention for two.
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda d=None, both=False: free(d, True) if both else 0
    )
    calls = []
    counting = model.clone()
    counting.add_wrapper(WrappersMP.APPLY_MODEL, lambda run, x, *a, **k: calls.append(len(x)) or run(x, *a, **k))
    split = sample(counting)
    assert calls == [1] * 6 and len(passes) == 2
    assert relative(split, batched) < 1e-5


def test_another_reference_size_or_weight_is_never_stale(passes):
    """Kept on purpose after the run, the worst that a ComfyUI without cleanup could do."""
    x, model = draw(2, *SHAPE), shown()
    first = call(model, x, cleanup=False)
    assert torch.equal(call(model, x, cleanup=False), first) and len(passes) == 1
    other = call(shown(MODEL, person(seed=5)), x, cleanup=False)
    assert not torch.equal(other, first)
    wide = draw(2, 1, 16, 3, 8, 10)
    assert torch.equal(call(model, wide, cleanup=False), call(shown(), wide))
    patched = lora(model)
    assert torch.equal(call_loaded(patched, x, cleanup=False), call_loaded(lora(shown()), x))
    MODEL.unpatch_model(tiny_model.CPU)
    assert torch.equal(call_loaded(model, x), first)


def test_scheduled_weights_are_never_stale(passes):
    """A hook whose strength goes by keyframes changes the model's weights in mid-run."""
    class Hook:
        strength = 0.0

    model, hook = shown(), Hook()
    model.current_hooks = type("Group", (), {"hooks": [hook]})()
    for strength in (0.0, 0.5, 0.5, 1.0):
        hook.strength = strength
        call(model, draw(2, *SHAPE), cleanup=False)
    assert len(passes) == 3 and len(models.attachment(model, sampling.KEY).cache) == 1


def test_odd_sizes_are_padded_as_comfyui_pads():
    """7 x 5 cells are 4 x 3 tokens; so is the reference's 5 x 3 padded to 3 x 2."""
    for shape in ((1, 16, 2, 7, 5), (2, 16, 1, 1, 1)):
        x, one = draw(2, *shape), person(latent=picture_latent(1, 5, 3))
        tokens = shape[2] * -(-shape[3] // 2) * -(-shape[4] // 2)
        result = call(shown(MODEL, one), x)
        assert result.shape == shape and relative(result, weighed(x, [torch.ones(tokens)], [one])) < 1e-5


def test_two_experts_each_with_their_own_adapter(passes):
    """Wan 2.2: one run on the model for high noise, then one on that for low noise."""
    low = tiny_model.wan(seed=7)
    low_adapter = method.adapter_from(tiny_model.video_adapter(low, seed=7))
    models = shown(), shown(low, person(adapter=low_adapter))
    grid = comfy.samplers.calculate_sigmas(MODEL.model.model_sampling, "simple", 4)
    first = sample(models[0], sigmas=grid[:3])
    result = sample(models[1], sigmas=grid[2:], latent=first)
    assert len(passes) == 2 and torch.isfinite(result).all()
    assert not torch.equal(result, sample(low, sigmas=grid[2:], latent=first))


def test_two_hundred_runs_by_turns_differ_in_no_bit():
    """A shorter version: three models in turn, each with the same result every time."""
    models = [MODEL, shown(), shown(MODEL, person(seed=5), person(seed=6, strength=0.5))]
    first = [sample(model) for model in models]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    for turn in (2, 0, 1, 2, 1, 0):
        assert torch.equal(sample(models[turn]), first[turn])


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_interrupt_in_the_pass_leaves_nothing_and_a_rerun_is_clean(block, monkeypatch, passes):
    model, expected = shown(), sample(shown())
    checks = []

    def interrupt():
        checks.append(1)
        if len(checks) == block + 1:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patched:
        patched.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call(model, draw(2, *SHAPE), cleanup=False)
    assert len(checks) == block + 1 and len(models.attachment(model, sampling.KEY).cache) == 0
    assert torch.equal(sample(model), expected)


def test_threads_of_several_devices_keep_to_their_own_model(passes):
    """Two loaded copies of a model share the patches, as ComfyUI's multi-GPU clones do."""
    model = shown()
    twin = model.clone()
    twin.model = tiny_model.wan(seed=8).model
    x = draw(2, *SHAPE)
    expected = [call(model, x), call(twin, x)]
    passes.clear()
    results, start = {}, threading.Barrier(2)

    def work(index, patcher):
        start.wait()
        results[index] = [call(patcher, x, cleanup=False) for _ in range(3)]

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((model, twin))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passes) == 2
    for index, wanted in enumerate(expected):
        assert all(torch.equal(result, wanted) for result in results[index])


@pytest.mark.parametrize("batch", [1, 4])
def test_the_cache_is_in_the_memory_estimate(batch):
    """Once, however many videos share it."""
    asked = []
    latents = picture_latent(1, 64, 64), picture_latent(2, 64, 64)
    model = shown(MODEL, person(latent=latents[0]), person(latent=latents[1], blocks="0-1"))

    def estimate(run, patcher, shape, *args, **kwargs):
        asked.append((patcher.model.memory_required(shape), patcher.model.memory_required([*shape[:-1], 1])))
        return run(patcher, shape, *args, **kwargs)

    plain = MODEL.clone()
    for patcher in (plain, model):
        patcher.add_wrapper(WrappersMP.PREPARE_SAMPLING, estimate)  # runs inside ours, which came first
        sample(patcher, (batch, *SHAPE[1:]))
    wanted = (3 + 2) * 2 * 1024 * 48 * 4  # blocks, K and V, tokens, width, bytes
    assert models.attachment(model, sampling.KEY).cache_bytes(MODEL.model) == wanted
    (before, column), (after, _) = asked
    assert wanted <= after - before <= wanted + column * 1.001  # whole columns, rounded up


def test_areas_and_scheduled_loras_are_in_the_memory_estimate():
    asked = []

    def estimate(run, patcher, shape, *args, **kwargs):
        asked.append(patcher.model.memory_required(shape))
        return run(patcher, shape, *args, **kwargs)

    def entry(area=None, hooks=None):
        options = {"strength": 1.0} | ({} if area is None else {"area": area, "set_area_to_bounds": False})
        return [tiny_model.conditioning(1)[0][0], options | ({} if hooks is None else {"hooks": hooks})]

    whole, left, right, top = entry(), entry((3, 8, 4, 0, 0, 0)), entry((2, 8, 4, 0, 0, 2)), entry((3, 4, 6, 0, 0, 0))
    edge, half = entry((99, 99, 0, 0)), entry(("percentage", 1.0, 1.0, 0.5, 0.0, 0.0, 0.0))
    loras = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    grown = []
    for positive in (
        [whole], [whole, left, right], [whole, left, right, top], [entry(hooks=loras)], [whole, edge],
        [whole, half, entry((3, 8, 3, 0, 0, 3))],
    ):
        patched = shown(MODEL, person(latent=picture_latent(1, 64, 64)))
        for patcher in (MODEL.clone(), patched):
            patcher.add_wrapper(WrappersMP.PREPARE_SAMPLING, estimate)
            sample(patcher, positive=positive)
        plain, with_cache = asked[-2:]
        grown.append((with_cache - plain) / models.attachment(patched, sampling.KEY).cache_bytes(MODEL.model))
    assert grown == pytest.approx([1, 2, 3, 2, 1, 2], rel=0.05)
