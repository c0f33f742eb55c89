"""The denoising loss: the error of the noise, or of the velocity, that a model predicts in a noisy latent.

It imports no ComfyUI: a method's objective is in its method.py and calls `Denoising` for the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .config import TrainingConfig

# ComfyUI's kinds of prediction by class name, looked up in a class's resolution order; None is refused.
_PREDICTIONS = {
    "EPS": "noise", "V_PREDICTION": "v", "EDM": "v", "CONST": "flow", "LCM": None,
    "V_PREDICTION_DDPM": None, "X0": None, "IMG_TO_IMG": None, "IMG_TO_IMG_FLOW": None, "COSMOS_RFLOW": None,
}


class Denoiser(Protocol):
    """What the loss needs of a model: session.ModelDenoiser, or a method's own class around one."""

    model: Any
    device: torch.device
    sigmas: torch.Tensor

    def denoise(self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Any) -> torch.Tensor:
        """The denoised estimate [B, C, ...] of B latents at sigma [B], with a graph to what is trained."""


@dataclass(frozen=True)
class Sample:
    """One picture or video to train on: latent [1, C, ...] in the model's space, and its prepared conditions."""

    latent: torch.Tensor
    conditions: dict[str, Any]


class Batches:
    """Seeded batches of `samples`, each from one bucket: samples that fit into one call of the model.

    A bucket is drawn in proportion to its size, then samples from it without repetition.
    """

    def __init__(self, samples: Sequence[Sample], size: int):
        self.size = size
        self.buckets: list[list[Sample]] = []
        for sample in samples:
            bucket = next((bucket for bucket in self.buckets if same_bucket(bucket[0], sample)), None)
            if bucket is None:
                self.buckets.append(bucket := [])
            bucket.append(sample)

    def draw(self, generator: torch.Generator) -> list[Sample]:
        return draw_batch(self.buckets, self.size, generator)


def draw_batch(buckets: Sequence[Sequence[Any]], size: int, generator: torch.Generator) -> list[Any]:
    """At most `size` members of one bucket, without repetition; a bucket is drawn in proportion to its size."""
    weights = torch.tensor([float(len(bucket)) for bucket in buckets])
    bucket = buckets[int(torch.multinomial(weights, 1, generator=generator))]
    order = torch.randperm(len(bucket), generator=generator)[:size]
    return [bucket[int(i)] for i in order]


def same_bucket(first: Sample, second: Sample) -> bool:
    """Whether both fit into one call of the model: latents of one shape, and conditions that can be batched."""
    if first.latent.shape[1:] != second.latent.shape[1:] or first.conditions.keys() != second.conditions.keys():
        return False
    return all(_can_batch(condition, second.conditions[name]) for name, condition in first.conditions.items())


def _can_batch(first: Any, second: Any) -> bool:
    """Whether two conditions of ComfyUI's fit into one batch; those of a method's own always do."""
    if type(first) is not type(second):
        return False
    if type(first).__name__ == "CONDCrossAttn":
        # Texts are repeated to a common length; can_concat limits how often, for the speed of sampling alone.
        return first.cond.shape[::2] == second.cond.shape[::2]
    return first.can_concat(second) if hasattr(first, "can_concat") else True


class Denoising:
    """The weighted denoising loss of a model, at noise levels drawn uniformly from its own table of sigmas."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig):
        self.denoiser = denoiser
        self.prediction_loss = PredictionLoss(denoiser.model.model_sampling, config.min_snr_gamma)

    def loss(self, clean: torch.Tensor, conditions: Any, generator: torch.Generator) -> torch.Tensor:
        """The loss of each of B latents, [B], in one forward pass; noise and levels come from `generator`."""
        noise = torch.randn(clean.shape, generator=generator)
        level = torch.randint(len(self.denoiser.sigmas), (len(clean),), generator=generator)
        return self.loss_at(clean, conditions, noise, level)

    def loss_at(self, clean: torch.Tensor, conditions: Any, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """`loss` with this noise, like `clean`, and these noise levels [B], indices into the sigmas."""
        device = self.denoiser.device
        clean, noise = clean.to(device), noise.to(device)
        sigma = self.denoiser.sigmas[level.to(device)]
        sampling = self.denoiser.model.model_sampling
        noisy = sampling.noise_scaling(sigma.reshape(-1, *[1] * (clean.ndim - 1)), noise, clean)
        denoised = self.denoiser.denoise(noisy, sigma, conditions)
        return self.prediction_loss(denoised, clean, sigma)


class DenoisingObjective(Denoising):
    """The plain objective: the mean denoising loss of seeded batches of `samples`."""

    def __init__(self, denoiser: Denoiser, samples: Sequence[Sample], config: TrainingConfig):
        super().__init__(denoiser, config)
        self.batches = Batches(samples, config.batch_size)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        batch = self.batches.draw(generator)
        clean = torch.cat([sample.latent for sample in batch])
        return self.loss(clean, [sample.conditions for sample in batch], generator).mean()


def prediction_kind(model_sampling: Any, purpose: str) -> str:
    """noise, v or flow. Raises ValueError, naming `purpose` and the model's kind, for another prediction."""
    kind = next((cls.__name__ for cls in type(model_sampling).__mro__ if cls.__name__ in _PREDICTIONS), "")
    if _PREDICTIONS.get(kind) is None:
        raise ValueError(
            f"{purpose} is not known for a model of {kind or 'this'} prediction: use one that predicts noise, "
            "v or flow"
        )
    return _PREDICTIONS[kind]


class PredictionLoss:
    """The mean square error of the prediction target, computed from the error of the denoised estimate.

    For ε-prediction |ε̂ - ε|² = |x̂ - x|² / σ²; for v-prediction with unit data variance
    |v̂ - v|² = |x̂ - x|² (σ² + 1) / σ²; for flow models |v̂ - v|² = |x̂ - x|² / σ². `min_snr_gamma` weights it by
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
