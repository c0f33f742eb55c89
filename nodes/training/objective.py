"""The denoising objective: predict the noise (or the velocity) that was mixed into a latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import TrainingConfig

# The host's kinds of prediction by class name, most special first in a class's own order; None is refused.
_PREDICTIONS = {
    "EPS": "noise", "V_PREDICTION": "v", "EDM": "v", "CONST": "flow", "LCM": None,
    "V_PREDICTION_DDPM": None, "X0": None, "IMG_TO_IMG": None, "IMG_TO_IMG_FLOW": None, "COSMOS_RFLOW": None,
}


@dataclass(frozen=True)
class Sample:
    """One picture or video to learn: latent [1, C, ...] in the model's space, and its prepared conditions."""

    latent: torch.Tensor
    conditions: dict[str, Any]


class Batches:
    """Seeded batches of `samples`, each of one kind: kinds are drawn by how many samples are of them, then samples
    without repetition. Of one kind are latents of one shape whose conditions fit into one call of the model.
    """

    def __init__(self, samples: Sequence[Sample], size: int):
        self.size = size
        self.buckets: list[list[Sample]] = []
        for sample in samples:
            own = next((bucket for bucket in self.buckets if alike(bucket[0], sample)), None)
            if own is None:
                self.buckets.append(own := [])
            own.append(sample)

    def draw(self, generator: torch.Generator) -> list[Sample]:
        weights = torch.tensor([float(len(bucket)) for bucket in self.buckets])
        bucket = self.buckets[int(torch.multinomial(weights, 1, generator=generator))]
        order = torch.randperm(len(bucket), generator=generator)[: self.size]
        return [bucket[int(i)] for i in order]


def alike(a: Sample, b: Sample) -> bool:
    """Whether both fit into one call of the model."""
    if a.latent.shape[1:] != b.latent.shape[1:] or a.conditions.keys() != b.conditions.keys():
        return False
    return all(_join(own, b.conditions[name]) for name, own in a.conditions.items())


def _join(one: Any, other: Any) -> bool:
    """Whether two conditions of the host's fit into one batch; what is none of the host's is its owner's matter."""
    if type(one) is not type(other):
        return False
    if type(one).__name__ == "CONDCrossAttn":  # repeats texts to one length, however long: only sampling is choosy
        return one.cond.shape[::2] == other.cond.shape[::2]
    return one.can_concat(other) if hasattr(one, "can_concat") else True


class DenoisingObjective:
    """Mean square error of the model's own prediction target on seeded batches of `samples`.

    Noise levels are uniform over the model's own table of sigmas. Batches and noise come from the step's generator.
    """

    def __init__(self, denoiser, samples: Sequence[Sample], config: TrainingConfig):
        self.denoiser = denoiser
        self.error = PredictionError(denoiser.model.model_sampling, config.min_snr_gamma)
        self.batches = Batches(samples, config.batch_size)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = self.batches.draw(generator)
        clean = torch.cat([sample.latent for sample in chosen])
        return self.loss(clean, [sample.conditions for sample in chosen], generator).mean()

    def loss(self, clean: torch.Tensor, conditions: list[dict], generator: torch.Generator) -> torch.Tensor:
        """Weighted error of each of B latents, [B]; one forward pass."""
        noise = torch.randn(clean.shape, generator=generator)
        level = torch.randint(len(self.denoiser.sigmas), (len(clean),), generator=generator)
        return self.loss_at(clean, conditions, noise, level)

    def loss_at(self, clean, conditions, noise, level) -> torch.Tensor:
        """`loss` with given noise, like `clean`, and given noise levels [B], indices into the sigmas."""
        device = self.denoiser.device
        clean, noise = clean.to(device), noise.to(device)
        sigma = self.denoiser.sigmas[level.to(device)]
        sampling = self.denoiser.model.model_sampling
        noisy = sampling.noise_scaling(sigma.reshape(-1, *[1] * (clean.ndim - 1)), noise, clean)
        denoised = self.denoiser.denoise(noisy, sigma, conditions)
        return self.error(denoised, clean, sigma)


def prediction_kind(model_sampling: Any, purpose: str) -> str:
    """noise, v or flow. Raises ValueError, naming `purpose` and the model's kind, for another prediction."""
    kind = next((cls.__name__ for cls in type(model_sampling).__mro__ if cls.__name__ in _PREDICTIONS), "")
    if _PREDICTIONS.get(kind) is None:
        raise ValueError(
            f"{purpose} is not known for a model of {kind or 'this'} prediction: use one that predicts noise, "
            "v or flow"
        )
    return _PREDICTIONS[kind]


class PredictionError:
    """The mean square error of the prediction target, from the error of the denoised estimate.

    For ε-prediction |ε̂ - ε|² = |x̂ - x|² / σ²; for v-prediction with unit data variance
    |v̂ - v|² = |x̂ - x|² (σ² + 1) / σ²; for flow models |v̂ - v|² = |x̂ - x|² / σ². `min_snr_gamma` weighs by
    min(SNR, γ) / SNR for ε and / (SNR + 1) for v (Hang et al., arXiv 2303.09556), as diffusers does.
    """

    def __init__(self, model_sampling: Any, min_snr_gamma: float):
        kind = prediction_kind(model_sampling, "training")
        self.flow, self.velocity = kind == "flow", kind == "v"
        if min_snr_gamma and self.flow:
            raise ValueError("min_snr_gamma is for noise and v prediction: set it to 0 for a flow model")
        self.gamma = min_snr_gamma

    def __call__(self, denoised: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """[B] for latents [B, C, ...] and sigma [B], in fp32."""
        error = (denoised.float() - clean.float()).square().flatten(1).mean(1)
        error = error / sigma.square()
        if self.velocity:
            error = error * (sigma.square() + 1)
        return error * self.weight(sigma)

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Min-SNR's factor, [B]; 1 where it is off."""
        if not self.gamma:
            return torch.ones_like(sigma)
        snr = sigma.pow(-2)
        clipped = snr.clamp(max=self.gamma)
        return clipped / (snr + 1) if self.velocity else clipped / snr
