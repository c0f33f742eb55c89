"""References on every relative of Wan, and with quantised weights, LoRAs, patches, compilers and caches."""

import logging

import comfy.ldm.modules.attention
import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic, attention_pytorch, attention_split, attention_sub_quad
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_train import TrainLoraNode
from pack.nodes.identity_prior import attention
from pack.nodes.video_identity import method, reference_pass
from support import tiny_model
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

X = draw(2, *SHAPE)


def rounded(dtype):
    """MODEL's weights after a round trip through `dtype`, in fp32, where a model of that type would round them."""
    stored = tiny_model.wan(dtype=dtype, compute=torch.float32)
    plain = tiny_model.wan()
    state = {key: value.float() for key, value in stored.model.diffusion_model.state_dict().items()}
    plain.model.diffusion_model.load_state_dict(state)
    return stored, plain


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_weights_stored_in_fewer_bits(dtype):
    stored, plain = rounded(dtype)
    result = call(shown(stored), X)
    assert relative(result, call(shown(plain), X)) < 1e-5
    assert relative(result, published(X, picture_latent(), model=plain)) < 1e-5


def test_bf16_throughout():
    model = tiny_model.wan(dtype=torch.bfloat16)
    for one in (person(), person(strength=0.5), person(mask=torch.ones(1, 4, 4) * 0.5)):
        result, exact = call(shown(model, one), X), call(shown(MODEL, one), X)
        assert torch.nn.functional.cosine_similarity(result.flatten(), exact.flatten(), dim=0) > 0.999


class Packed(comfy.ops.manual_cast):
    """Layers whose stored weight is not the weight: only their own forward knows, as with GGUF files."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, -self.weight.to(x), self.bias.to(x))


def test_custom_operations_are_used_and_no_weight_is_read():
    packed, plain = tiny_model.wan(operations=Packed), tiny_model.wan()
    for module in plain.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.neg_()
    assert torch.equal(call(shown(packed), X), call(shown(plain), X))
    assert relative(call(shown(packed), X), published(X, picture_latent(), model=plain)) < 1e-5


def test_a_lora_changes_both_branches_in_either_order():
    expected = tiny_model.wan()
    network = expected.model.diffusion_model
    for i, name in enumerate(("blocks.0.self_attn.q", "blocks.1.ffn.0")):
        weight = network.get_submodule(name).weight
        weight += 0.7 * draw(20 + i, weight.shape[0], 2) @ draw(30 + i, 2, weight.shape[1])
    wanted = published(X, picture_latent(), model=expected)
    for patched in (lora(shown()), shown(lora(MODEL))):
        assert relative(call_loaded(patched, X), wanted) < 1e-5


def test_weights_that_stay_off_the_device_until_needed():
    """Low memory: every layer keeps its weight elsewhere and casts it in its forward."""
    model = tiny_model.wan(operations=comfy.ops.manual_cast)
    patched = lora(shown(model))
    full = call_loaded(patched, X)
    with torch.inference_mode():
        patched.load(tiny_model.CPU, lowvram_model_memory=1)
    assert any(getattr(m, "comfy_patched_weights", None) is not True for m in model.model.modules())
    try:
        assert relative(call(patched, X), full) < 1e-5
    finally:
        patched.detach()


def test_weights_that_are_unloaded_in_mid_run():
    """As when another model needs the room; the LoRA then acts in the cast of every layer."""
    patched, freed = lora(shown(tiny_model.wan(operations=comfy.ops.manual_cast))), []

    def make_room(step, *_rest):
        if step == 1:
            freed.append(patched.partially_unload(tiny_model.CPU, 1 << 14))

    results = []
    for callback in (None, make_room):
        results.append(sample(patched, steps=4, callback=callback))
        patched.detach()
    assert freed[0] >= 1 << 14 and relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("backend", [attention_pytorch, attention_split, attention_sub_quad, attention_basic])
def test_attention_backends(backend, monkeypatch):
    for module in (comfy.ldm.wan.model, reference_pass):
        monkeypatch.setattr(module, "optimized_attention", backend)
    assert relative(call(shown(), X), published(X, picture_latent())) < 1e-5
    weights = [torch.full((36,), 0.4)]
    assert relative(call(shown(strength=0.4), X), weighed(X, weights, [person()])) < 1e-5


def test_the_user_s_attention_is_called_once_per_block_on_one_buffer():
    seen = []

    def user_attention(function, q, k, v, heads, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return function(q, k, v, heads, **kwargs)

    for order in (0, 1):
        model = MODEL.clone() if order else shown()
        model.model_options["transformer_options"]["optimized_attention_override"] = user_attention
        model = shown(model) if order else model
        seen.clear()
        assert torch.equal(call(model, X), call(shown(), X))
        # Two blocks of the reference, whose third needs none; then self- and cross-attention of each block.
        assert seen == [(6, 6)] * 2 + [(36, 42), (36, 4)] * 3


def doubling(i):
    def patch(args, extra):
        out = extra["original_block"](args)
        return {"img": 1.5 * out["img"]}

    return patch


def test_earlier_and_later_block_patches_are_kept():
    def other(model):
        model = model.clone()
        model.set_model_patch_replace(doubling(1), "dit", "double_block", 1)
        return model

    first = call(shown(other(MODEL)), X)
    assert not torch.equal(first, call(shown(), X)) and not torch.equal(first, call(other(MODEL), X))

    def chaining(model):
        """A patch that calls the one it replaces, as a careful extension does."""
        model = model.clone()
        earlier = model.model_options["transformer_options"]["patches_replace"]["dit"][("double_block", 1)]
        model.set_model_patch_replace(
            lambda args, extra: {"img": 1.5 * earlier(args, extra)["img"]}, "dit", "double_block", 1
        )
        return model

    assert torch.equal(call(chaining(shown()), X), first)
    # A second reference goes around it, and the references are still added once.
    pair = person(), person(seed=5)
    around = shown(chaining(shown(MODEL, pair[0])), pair[1])
    assert torch.equal(call(around, X), call(chaining(shown(MODEL, *pair)), X))


def test_blocks_that_a_later_patch_replaces_are_named_after_the_run(caplog):
    def plain(_args, extra):
        return extra["original_block"](_args)

    with caplog.at_level(logging.WARNING):
        sample(with_patch(with_patch(MODEL, plain), plain))
        sample(with_patch(MODEL.clone(), plain))
        sample(shown(with_patch(MODEL, plain)))
        sample(SkipLayerGuidanceDiT.execute(shown(), 3.0, 0.0, 1.0, "1").result[0])
        sample(EasyCacheNode.execute(shown(), 0.5, 0.1, 0.9, False).result[0], steps=6)
        sample(shown(MODEL, person(blocks="0")))
        copying = shown()
        copying.add_wrapper(WrappersMP.DIFFUSION_MODEL, lambda run, x, t, context, clip, concat, options, **rest: run(
            x, t, context, clip, concat, comfy.model_patcher.create_model_options_clone(options), **rest
        ))
        sample(copying)
    assert "did not act" not in caplog.text
    with caplog.at_level(logging.WARNING):
        sample(with_patch(shown(), plain))
    assert "did not act in blocks [1]" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_comfyui_trains_a_lora_through_a_model_that_shows_a_reference(monkeypatch, checkpointing):
    """Weights that a graph loaded are of inference mode, and no step may read another's keys and values."""
    recomputed, reference_kv = [], reference_pass.reference_kv
    monkeypatch.setattr(reference_pass, "reference_kv", lambda *inputs, recompute, **settings: recomputed.append(
        recompute
    ) or reference_kv(*inputs, recompute=recompute, **settings))
    with torch.inference_mode():
        loaded = method.adapter_from({key: tensor.clone() for key, tensor in ADAPTER.tensors().items()})
        losses = []
        for shows in (True, False):
            model = tiny_model.as_loaded(tiny_model.wan())
            model.cached_patcher_init = (lambda **_k: tiny_model.as_loaded(tiny_model.wan()), ())
            if shows:
                model = shown(model, person(adapter=loaded), person(5, loaded, torch.full((1, 8, 6), 0.5)))
            trained = TrainLoraNode.execute(
                model=[model], latents=[{"samples": X}, {"samples": draw(3, 1, 16, 3, 6, 8)}],
                positive=[tiny_model.conditioning(1)], batch_size=[1],
                grad_accumulation_steps=[1], steps=[3], learning_rate=[1e-2], rank=[2], optimizer=["AdamW"],
                loss_function=["MSE"], seed=[0], training_dtype=["fp32"], lora_dtype=["fp32"],
                quantized_backward=[False], algorithm=["LoRA"], gradient_checkpointing=[checkpointing],
                checkpoint_depth=[1], offloading=[False], existing_lora=["[None]"], bucket_mode=[False],
                bypass_mode=[False],
            )
            losses.append(trained.result[1]["loss"])
    assert len(losses[0]) == 3 and losses[0] != losses[1]
    assert len(recomputed) == 3 * 2 and all(recomputed)  # the steps' references: a backward pass keeps little of them


def with_patch(model, patch):
    model = model.clone()
    model.set_model_patch_replace(patch, "dit", "double_block", 1)
    return model


def test_an_earlier_patch_may_run_its_block_twice_or_skip_it():
    def twice(args, extra):
        first, second = (extra["original_block"](args)["img"] for _ in range(2))
        assert torch.equal(first, second)
        return {"img": second}

    def skip(args, extra):
        return args

    assert torch.equal(call(shown(with_patch(MODEL, twice)), X), call(shown(), X))
    assert torch.equal(call(shown(with_patch(MODEL, skip)), X), call(with_patch(shown(), skip), X))
    with pytest.raises(RuntimeError, match="block 1 of this model did not use ComfyUI's attention"):
        call(shown(with_patch(MODEL, lambda args, extra: {"img": 1.5 * args["img"]})), X)


def test_an_attention_that_was_replaced_is_named_not_ignored():
    attention = MODEL.model.diffusion_model.blocks[1].self_attn
    cross = MODEL.model.diffusion_model.blocks[1].cross_attn
    try:
        attention.forward = lambda x, freqs, transformer_options={}: x
        cross.forward = lambda x, context, **kwargs: x
        with pytest.raises(RuntimeError, match="block 1 of this model did not use ComfyUI's attention"):
            call(shown(), X)
    finally:
        del attention.forward, cross.forward


@pytest.mark.parametrize("keys", [["diffusion_model"], [f"diffusion_model.blocks.{i}" for i in range(3)]])
@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}])
@pytest.mark.parametrize("first", [True, False])
def test_compiled_models_give_the_same_and_never_compile_again(keys, settings, first):
    """Only the compiler's front end, which decides about recompiling; code generation is ComfyUI's part."""
    torch._dynamo.reset()
    plain = MODEL.clone()
    if first:
        set_torch_compile_wrapper(plain, backend="eager", keys=keys)
    model = shown(plain, person(**settings))
    if not first:
        set_torch_compile_wrapper(model, backend="eager", keys=keys)
    expected = sample(shown(MODEL, person(**settings)))
    assert relative(sample(model), expected) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative(sample(model, seed=8), sample(shown(MODEL, person(**settings)), seed=8)) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_easycache_skips_steps_beside_it(node):
    def cached(model):
        return node.execute(model, 10.0, 0.1, 1.0, False).result[0]

    results = [sample(cached(shown()), steps=8), sample(shown(cached(MODEL)), steps=8)]
    assert torch.equal(*results) and not torch.equal(results[0], sample(shown(), steps=8))
    assert not torch.equal(results[0], sample(cached(MODEL), steps=8))


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}])
def test_an_identity_prior_sees_the_cross_attention_beside_it(settings):
    """With a strength the user's attention is not called for the video, only for the text."""
    seen = []

    class Recorder:
        def record(self, index, q, k, heads, options):
            seen.append((index, k.shape[1]))

    one = person(**settings)
    for model in (attention.with_recorder(shown(MODEL, one)), shown(attention.with_recorder(MODEL), one)):
        result = call(model, X, options={attention.KEY: Recorder()})
        assert seen == [(0, 4), (1, 4), (2, 4)] and torch.equal(result, call(shown(MODEL, one), X))
        seen.clear()


def test_a_guidance_that_skips_a_block_beside_it():
    """ComfyUI's node puts its own patch instead of ours, for one call of the model in every step."""
    def guided(model):
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1").result[0]

    results = [sample(guided(shown())), sample(shown(guided(MODEL)))]
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(shown())) and not torch.equal(results[0], sample(guided(MODEL)))


def test_the_adapter_is_not_touched():
    before = {key: tensor.clone() for key, tensor in ADAPTER.tensors().items()}
    sample(shown())
    assert all(torch.equal(tensor, before[key]) for key, tensor in ADAPTER.tensors().items())
