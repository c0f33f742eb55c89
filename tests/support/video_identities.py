"""Tiny Wan models with references, called as in a sampling run, and the same results by the definition."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.weight_adapter
import torch
from comfy.context_windows import IndexListContextWindow
from pack.nodes.patching import models
from pack.nodes.video_identity import method, sampling
from pack.nodes.video_identity.config import VideoIdentityConfig
from support import published_wan, tiny_model

MODEL = tiny_model.wan()
ADAPTER = method.adapter_from(tiny_model.video_adapter(MODEL))
EULER = comfy.samplers.sampler_object("euler")
SHAPE = (1, 16, 3, 8, 6)  # 9 video frames; 3 x 4 x 3 tokens


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture_latent(seed=1, height=6, width=4, channels=16):
    """The latent of a reference picture."""
    return draw(seed, 1, channels, 1, height, width)


def person(seed=1, adapter=ADAPTER, mask=None, latent=None, **settings):
    """A VideoReference as Apply Video Identity makes it."""
    latent = picture_latent(seed) if latent is None else latent
    return method.video_reference(adapter, latent, VideoIdentityConfig(**settings), mask)


def shown(model=MODEL, *people, **settings):
    """`model` with these references, or with one of these settings."""
    for one in people or (person(**settings),):
        model = sampling.apply(model, one)
    return model


def call(patcher, x, sigma=0.7, context=None, options=None, cleanup=True, **conditions):
    """One call of the model as a sampling run makes it: x minus sigma times the velocity."""
    sigma = torch.full((len(x),), sigma)
    context = draw(9, len(x), 4, tiny_model.CONTEXT) if context is None else context
    model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    comfy.sampler_helpers.prepare_model_patcher(patcher, {}, model_options)
    with torch.inference_mode():
        patcher.pre_run()
        try:
            return patcher.model.apply_model(
                x, sigma, c_crossattn=context, **conditions,
                transformer_options={**model_options["transformer_options"], **(options or {})},
            )
        finally:
            if cleanup:
                patcher.cleanup()


def sample(patcher, shape=SHAPE, steps=3, **options):
    sampler = options.pop("sampler", EULER)
    return tiny_model.sample(patcher, sampler, shape=shape, scheduler="simple", steps=steps, **options)


def published(x, references, sigma=0.7, adapter=None, model=MODEL):
    """The published velocity as a denoised estimate, of one reference or of none."""
    base = model.model
    wan = published_wan.Wan(base.diffusion_model.state_dict(), 2, 32, (adapter or ADAPTER).tensors())
    sigma = torch.full((len(x),), sigma)
    latent = base.process_latent_in(references.clone()) if references is not None else None
    velocity = wan(x, base.model_sampling.timestep(sigma), draw(9, len(x), 4, tiny_model.CONTEXT), latent)
    return x - sigma.reshape(-1, 1, 1, 1, 1) * velocity


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def window(frames, total):
    """A context window over these latent frames."""
    return IndexListContextWindow(frames, dim=2, total_frames=total)


def lora(model, strength=0.7):
    """`model` with a low-rank patch on a query and a feed-forward weight."""
    patched = model.clone()
    parts = {}
    for i, name in enumerate(("blocks.0.self_attn.q", "blocks.1.ffn.0")):
        weight = model.model.diffusion_model.get_submodule(name).weight
        update = comfy.weight_adapter.LoRAAdapter(
            set(), (draw(20 + i, weight.shape[0], 2), draw(30 + i, 2, weight.shape[1]), None, None, None, None)
        )
        parts[f"diffusion_model.{name}.weight"] = update
    assert len(patched.add_patches(parts, strength)) == 2
    return patched


def call_loaded(patcher, x, **options):
    comfy.model_management.load_models_gpu([patcher])
    try:
        return call(patcher, x, **options)
    finally:
        patcher.detach()


def cached_kv(cache):
    """The only keys and values in a cache."""
    (versions,) = [versions for key, (_, versions) in cache._entries.items() if key[1] == "kv"]
    (kv,) = versions.values()
    return kv


def weighed(x, weights, people, model=MODEL, **conditions):
    """The model's output with references and weights [N], in its own blocks, each softmax by the definition."""
    defined = model.clone()
    kvs = []
    for one in people:
        model_with = shown(model, one)
        call(model_with, x, cleanup=False, **conditions)
        cache = models.attachment(model_with, sampling.KEY).cache
        kvs.append(cached_kv(cache))
        cache.clear()

    def patch_of(i):
        def patch(args, extra):
            seen = []

            def attention(function, q, k, v, heads, **kwargs):
                if seen:
                    return function(q, k, v, heads, **kwargs)
                seen.append(1)
                q, k, v = (t.unflatten(-1, (heads, -1)).double() for t in (q, k, v))
                out = torch.zeros_like(q)
                for n in range(q.shape[1]):
                    score = [torch.einsum("bhd,bmhd->bhm", q[:, n], k) / q.shape[-1] ** 0.5]
                    for kv, weight in zip(kvs, weights, strict=True):
                        s = torch.einsum("bhd,bmhd->bhm", q[:, n], kv[i][0].double().expand(len(q), -1, -1, -1))
                        score.append(s / q.shape[-1] ** 0.5 + torch.log(weight[n].double()))
                    share = torch.cat(score, -1).softmax(-1)
                    values = torch.cat([v, *(kv[i][1].double().expand(len(q), -1, -1, -1) for kv in kvs)], 1)
                    out[:, n] = torch.einsum("bhm,bmhd->bhd", share, values)
                return out.flatten(2).float()

            options = {**args["transformer_options"], "optimized_attention_override": attention}
            return extra["original_block"]({**args, "transformer_options": options})

        return patch

    for i in range(len(model.model.diffusion_model.blocks)):
        defined.set_model_patch_replace(patch_of(i), "dit", "double_block", i)
    return call(defined, x, **conditions)
