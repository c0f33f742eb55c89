"""Sampling runs of a tiny model with an action, hooks that set what its layers read, and comparisons of runs."""

import contextlib

import comfy.samplers
import torch
from pack.nodes.action_identifier import sampling
from support import action_identifiers, tiny_clip, tiny_model

CLIP = tiny_clip.clip()
MODEL = action_identifiers.reading(tiny_model.picture())
ACTION = action_identifiers.identifier(MODEL)
NEGATIVE = action_identifiers.plain(CLIP, "")
EULER = comfy.samplers.sampler_object("euler")


def prompt(text=action_identifiers.TEXT, actions=(ACTION,), clip=CLIP):
    return action_identifiers.prompt(clip, list(actions), text)


def plain(text="a cat dancing on a beach", clip=CLIP):
    return action_identifiers.plain(clip, text)


def sample(model, positive, **options):
    options = {"steps": 2, "negative": NEGATIVE, **options}
    return tiny_model.sample(model, EULER, positive=positive, **options)


def denoised(model, positive):
    """The estimate itself: one step of Euler to sigma 0."""
    return sample(model, positive, cfg=1.0, sigmas=torch.tensor([5.0, 0.0]))


def estimate(positive):
    return denoised(sampling.apply(MODEL, 1.0), positive)


def close(actual, expected):
    """For pictures with deviations of 10 or more, since batches of other sizes round differently."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)


def far(actual, other):
    """They differ by more than rounding and tolerance."""
    assert (actual - other).abs().max() > 0.05 * other.std()


def contexts_of(conditioning):
    return conditioning[0][1]["model_conds"][sampling.KEY].contexts


@contextlib.contextmanager
def forced(model, contexts, rows=slice(None)):
    """Make each cross-attention read its entry of `contexts`, in the order of the network's modules."""
    layer = -1
    handles = []

    def reads(number):
        def hook(_module, args, kwargs):
            context = kwargs["context"].clone()
            context[rows] = contexts[number].to(context)
            return args, {**kwargs, "context": context}

        return hook

    for _, module in model.model.diffusion_model.named_modules():
        if hasattr(module, "transformer_blocks"):
            layer += 1
            for block in module.transformer_blocks:
                handles.append(block.attn2.register_forward_pre_hook(reads(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def passes(model):
    """A list that gets the number of samples in each pass of the network."""
    sizes = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()
