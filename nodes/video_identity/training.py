"""Training of a video identity adapter on videos and their references, through the shared training loop."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...kernels.restricted_attention import Reference
from ..inputs.families import family
from ..inputs.model_fit import check_latents, check_texts
from ..messages import tell
from ..patching import models
from ..training.checkpoints import Checkpoints
from ..training.config import TrainingConfig
from ..training.objective import WEIGHTS, DenoisingObjective, Sample, prediction_kind, samples_of
from ..training.parallel import check_shares
from ..training.reference_loss import ReferenceLoss
from ..training.runs import LossMap, run
from ..training.seeds import seed_for
from ..training.session import ModelDenoiser, session
from . import method, reference_pass, sampling
from .config import BELL, EVEN

_REFERENCE = "understudy_reference"


def train(
    model: Any, latents: Sequence[torch.Tensor], references: Sequence[torch.Tensor], conditionings: Sequence[list],
    config: TrainingConfig, rank: int, *, checkpoints: Checkpoints, resume_from: str,
    weights: Sequence[torch.Tensor] | None = None, loss_weighting: str = EVEN,
) -> tuple[method.VideoAdapter, LossMap]:
    """Train the updates of the reference's q, k and v; the loss is on the video's tokens alone.

    latents: [1, C, T, H, W] each, references: [1, C, 1, h, w] each, as VAE Encode returns them; one latent, reference
    and CONDITIONING per video, and where there are masks `weights` [1, 1, T, H, W] of the latent's cells. Noise
    levels are drawn and weighted by `loss_weighting`, one of config.LOSS_WEIGHTINGS. Returns the adapter, fp32 on the
    CPU, and ComfyUI's LOSS_MAP. The model is not modified. Raises TrainingDiverged, ValueError as `session` does, and
    ComfyUI's interruption.
    """
    resume = checkpoints.resume(resume_from)
    with prepared(model, latents, references, conditionings, config, rank, weights) as (adapter, samples, denoiser):
        options = {}
        if loss_weighting == BELL:
            denoiser.sigmas = method.training_sigmas().to(denoiser.sigmas)
            options["level_weight"] = method.bell_weight
        objective = DenoisingObjective(denoiser, samples, config, **options)
        loss_map = run(
            objective, adapter.tensors(), config, denoiser.device, checkpoints=checkpoints, resume=resume,
            reference_loss=ReferenceLoss.of_samples(objective, samples),
        )
        return _mapped(adapter, lambda tensor: tensor.detach().cpu().clone()), loss_map


@contextlib.contextmanager
def prepared(
    model: Any, latents: Sequence[torch.Tensor], references: Sequence[torch.Tensor], conditionings: Sequence[list],
    config: TrainingConfig, rank: int, weights: Sequence[torch.Tensor] | None = None,
) -> Iterator[tuple[method.VideoAdapter, list[Sample], WithReferences]]:
    """An untrained adapter, its samples, and the model with it, ready for the objective; arguments as `train`."""
    network = sampling.wan_network(model)
    check_shares(config.batch_size, len(latents))
    prediction_kind(model.get_model_object("model_sampling"), "training", family(model))
    if models.attachment(model, sampling.KEY):
        warning = "training ignores the references on this model: connect the model without them"
        tell("Train Video Identity Adapter", [warning], logging.WARNING)
    for name, inputs in (("latents", latents), ("references", references)):
        check_latents(inputs, name, model)
    check_texts(conditionings, "positive", model)
    count = len(network.blocks) * len(method.PROJECTIONS) * 2 * rank * network.dim
    # To the model's memory a reference is further frames of the video.
    video, picture = (max(inputs, key=torch.Tensor.numel) for inputs in (latents, references))
    frames = video.shape[2] + math.ceil(picture[0, 0].numel() / video[0, 0, 0].numel())
    shape = [config.batch_size, video.shape[1], frames, *video.shape[3:]]
    with session(sampling.with_block_patches(model), shape, config, extra_parameters=count) as denoiser:
        untrained = method.new_adapter(
            network.dim, len(network.blocks), rank, lambda i: seed_for(config.seed, "adapter", i)
        )
        adapter = _mapped(untrained, lambda tensor: torch.nn.Parameter(tensor.detach().to(denoiser.device)))
        in_model_space = denoiser.model.process_latent_in
        samples = samples_of(
            (latents, references, conditionings, *([] if weights is None else [weights])),
            latent=lambda latent, *_: in_model_space(latent.clone()).float(),
            conditions=lambda latent, reference, conditioning, *weight: {
                **denoiser.prepare(conditioning, latent), _REFERENCE: in_model_space(reference.clone()).float(),
                **{WEIGHTS: cells for cells in weight},
            },
        )
        yield adapter, samples, WithReferences(denoiser, adapter, config.gradient_checkpointing)


class WithReferences(ModelDenoiser):
    """A denoiser in which the tokens of each video see its reference, which is among the sample's conditions."""

    def __init__(self, denoiser: ModelDenoiser, adapter: method.VideoAdapter, recompute: bool = False):
        super().__init__(denoiser.patcher)
        self.adapter, self.recompute = adapter, recompute

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict]) -> torch.Tensor:
        latent = torch.cat([c[_REFERENCE] for c in conditions]).to(noisy.device)
        conditions = [{key: value for key, value in c.items() if key != _REFERENCE} for c in conditions]
        kv = reference_pass.reference_kv(
            self.model, self.adapter, latent, blocks=frozenset(range(len(self.network.blocks))),
            video_size=reference_pass.token_grid(self.network, noisy), options=self.transformer_options,
            recompute=self.recompute,
        )
        by_block = {i: (Reference(k, v),) for i, (k, v) in kv.items()}
        return super().denoise(noisy, sigma, conditions, {sampling.KEY: by_block})


def _mapped(adapter: method.VideoAdapter, change) -> method.VideoAdapter:
    """The adapter with change(tensor) instead of each matrix."""
    return method.VideoAdapter(tuple(
        method.BlockUpdates(**{
            name: method.ProjectionUpdate(*(change(getattr(getattr(block, name), part)) for part in ("down", "up")))
            for name in method.PROJECTIONS
        })
        for block in adapter.blocks
    ))
