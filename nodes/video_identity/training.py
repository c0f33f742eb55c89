"""From videos and references of a graph to a trained video identity adapter, through the shared training loop."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...kernels.restricted_attention import Reference
from ..patching import models
from ..training import loop
from ..training.checkpoints import Checkpoints
from ..training.config import TrainingConfig
from ..training.objective import DenoisingObjective, Sample
from ..training.runs import LossMap, run
from ..training.session import Denoiser, session
from . import method, running

_REFERENCE = "understudy_reference"
_FIRST_SEED = 2_000_000_011  # beside those of the steps and of plain LoRAs


def train(
    model: Any,
    latents: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    conditionings: Sequence[list],
    config: TrainingConfig,
    rank: int,
    *,
    checkpoints: Checkpoints,
    resume_from: str,
) -> tuple[method.VideoAdapter, LossMap]:
    """Train the image branch's q, k and v updates; the error is that of the video's own tokens.

    latents: [1, C, T, H, W] each, references: [1, C, 1, h, w], as VAE Encode gives them, one of each and one
    CONDITIONING a video. Returns the adapter, fp32 on the CPU, and the host's LOSS_MAP. The model is not changed.
    Raises loop.TrainingDiverged, ValueError as `session` does, and the host's interruption.
    """
    resume = checkpoints.resume(resume_from)
    with prepared(model, latents, references, conditionings, config, rank) as (adapter, samples, denoiser):
        objective = DenoisingObjective(denoiser, samples, config)
        loss_map = run(
            objective, adapter.tensors(), config, denoiser.device, checkpoints=checkpoints, resume=resume
        )
        return _mapped(adapter, lambda tensor: tensor.detach().cpu().clone()), loss_map


@contextlib.contextmanager
def prepared(
    model: Any, latents: Sequence[torch.Tensor], references: Sequence[torch.Tensor], conditionings: Sequence[list],
    config: TrainingConfig, rank: int,
) -> Iterator[tuple[method.VideoAdapter, list[Sample], WithReferences]]:
    """An untrained adapter, what it learns from, and the model with it, ready for the objective; as `train` takes."""
    largest, pictures = (max(given, key=torch.Tensor.numel) for given in (latents, references))
    patched = running.extended(model)
    if models.attachment(model, running.KEY):
        logging.warning("[Understudy] training leaves out the references that the model shows: connect the plain one")
    for name, given in (("latents", latents), ("references", references)):
        for latent in given:
            running.check_channels(model, latent, name)
    network = running.wan_network(patched)
    weights = len(network.blocks) * len(method.PROJECTIONS) * 2 * rank * network.dim
    # A reference is more frames of the video to the model's memory.
    more = math.ceil(pictures[0, 0].numel() / largest[0, 0, 0].numel())
    shape = [config.batch_size, largest.shape[1], largest.shape[2] + more, *largest.shape[3:]]
    with session(patched, shape, config, trained=weights) as denoiser:
        made = method.new_adapter(
            network.dim, len(network.blocks), rank, lambda i: loop.step_seed(config.seed, _FIRST_SEED + i)
        )
        adapter = _mapped(made, lambda tensor: torch.nn.Parameter(tensor.detach().to(denoiser.device)))
        samples = []
        for latent, reference, conditioning in zip(latents, references, conditionings, strict=True):
            into = denoiser.model.process_latent_in
            conditions = denoiser.prepare(conditioning, latent)
            conditions[_REFERENCE] = into(reference.clone()).float()
            samples.append(Sample(into(latent.clone()).float(), conditions))
        yield adapter, samples, WithReferences(denoiser, adapter, config.gradient_checkpointing)


class WithReferences:
    """A Denoiser whose video tokens see each sample's own reference."""

    def __init__(self, denoiser: Denoiser, adapter: method.VideoAdapter, recompute: bool = False):
        self.denoiser = denoiser
        self.adapter = adapter
        self.recompute = recompute
        self.model, self.device, self.sigmas = denoiser.model, denoiser.device, denoiser.sigmas

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict]) -> torch.Tensor:
        images = torch.cat([c[_REFERENCE] for c in conditions]).to(noisy.device)
        conditions = [{key: value for key, value in c.items() if key != _REFERENCE} for c in conditions]
        network = self.denoiser.network
        rows = running.reference_rows(
            self.model, self.adapter, images, frozenset(range(len(network.blocks))),
            running.token_grid(network, noisy), self.denoiser.transformer_options, self.recompute,
        )
        seen = {i: (Reference(k, v),) for i, (k, v) in rows.items()}
        return self.denoiser.denoise(noisy, sigma, conditions, {running.KEY: seen})


def _mapped(adapter: method.VideoAdapter, change) -> method.VideoAdapter:
    """The adapter with change(tensor) in place of each matrix."""
    return method.VideoAdapter(tuple(
        method.BlockUpdates(**{
            name: method.LowRank(*(change(getattr(getattr(block, name), part)) for part in ("down", "up")))
            for name in method.PROJECTIONS
        })
        for block in adapter.blocks
    ))
