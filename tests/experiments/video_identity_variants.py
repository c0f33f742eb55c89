"""What the publication compares the restricted attention with: the same network, one line changed each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from comfy.patcher_extension import WrappersMP
from pack.nodes.video_identity import training
from support import published_wan


class Vanilla(published_wan.Wan):
    """Image tokens and video tokens all see each other."""

    def attention(self, q, k, v, count):
        return self.softmax(q, k, v)


class Shared(published_wan.Wan):
    """The reference at the video's own positions: the first frame's, from its upper left corner."""

    def image_positions(self, rows, columns, image_rows, image_columns):
        return [(0, h, w) for h in range(image_rows) for w in range(image_columns)]


VARIANTS = {"vanilla attention": Vanilla, "shared positions": Shared}


def network(kind: type[published_wan.Wan], model, adapter: dict[str, torch.Tensor]) -> published_wan.Wan:
    """`kind` with the weights of a host's MODEL or its diffusion model, in fp32 on their device."""
    wan = getattr(model, "model", model).diffusion_model
    found = kind(wan.state_dict(), wan.num_heads, wan.freq_dim, adapter, dtype=torch.float32)
    turns = functools.cache(functools.partial(kind.rotations, found))
    found.rotations = lambda positions: turns(tuple(positions))
    return found


class _Denoiser:
    """Stands for the pack's own denoiser with references: the same call, through a variant's network."""

    def __init__(self, kind, denoiser, adapter):
        self.model, self.device, self.sigmas = denoiser.model, denoiser.device, denoiser.sigmas
        self.network = network(kind, denoiser.model, adapter.tensors())

    def denoise(self, noisy, sigma, conditions):
        reference = torch.cat([condition[training._REFERENCE] for condition in conditions]).to(noisy.device)
        context = torch.cat([condition["c_crossattn"].cond for condition in conditions]).to(noisy.device)
        self.network.attended.clear()
        timestep = self.model.model_sampling.timestep(sigma)
        return noisy - sigma.reshape(-1, 1, 1, 1, 1) * self.network(noisy, timestep, context, reference)


@contextlib.contextmanager
def trained_with(kind: type[published_wan.Wan]) -> Iterator[None]:
    """Inside, the pack's training learns an adapter for `kind` instead of for the restricted attention."""
    own = training.WithReferences
    training.WithReferences = functools.partial(_Denoiser, kind)
    try:
        yield
    finally:
        training.WithReferences = own


def applied(kind: type[published_wan.Wan], model, adapter: dict[str, torch.Tensor], reference: torch.Tensor):
    """A clone of MODEL that samples through `kind` with a reference latent [1, C, 1, h, w] as VAE Encode gives it."""
    wan = network(kind, model, adapter)
    image = model.model.process_latent_in(reference.clone()).float()

    def call(_apply, args):
        x, sigma = args["input"], args["timestep"]
        wan.attended.clear()
        velocity = wan(x, model.model.model_sampling.timestep(sigma), args["c"]["c_crossattn"], image)
        return x - sigma.reshape(-1, 1, 1, 1, 1) * velocity

    patched = model.clone()
    patched.set_model_unet_function_wrapper(call)
    return patched


def as_first_frame(model, reference: torch.Tensor):
    """A clone of MODEL that sees the reference before the video, clean at timestep 0, and drops what becomes of it.

    Under full attention, as image-to-video models of one timestep a frame see their first picture.
    """
    image = model.model.process_latent_in(reference.clone()).float()

    def call(execute, x, timestep, *rest, **named):
        longer = torch.cat([image.to(x).expand(len(x), -1, -1, -1, -1), x], 2)
        timesteps = timestep[:, None].repeat(1, longer.shape[2])
        timesteps[:, 0] = 0
        return execute(longer, timesteps, *rest, **named)[:, :, 1:]

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "clean first frame", call)
    return patched
