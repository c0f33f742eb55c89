"""The denoising loss: the error of the noise, or of the velocity, that a model predicts in a noisy latent.

It imports no ComfyUI: a method's objective is in its method.py and calls `Denoising` for the loss.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .config import TrainingConfig
from .parallel import in_shares
from .stored import is_stored

# ComfyUI's kinds of prediction by class name, looked up in a class's resolution order; None is refused.
_PREDICTIONS = {
    "EPS": "noise", "V_PREDICTION": "v", "EDM": "v", "CONST": "flow", "COSMOS_RFLOW": "scaled flow", "LCM": None,
    "V_PREDICTION_DDPM": None, "X0": None, "IMG_TO_IMG": None, "IMG_TO_IMG_FLOW": None,
}


# Among a sample's conditions, the weight of each cell of its latent in the loss, [1, 1, ...]; 1 where there is none.
WEIGHTS = "understudy_loss_weights"


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


class LaterSample:
    """A sample that is read each time that it is drawn, of a data set that is larger than memory."""

    def __init__(self, latent: Callable[[], torch.Tensor], conditions: Callable[[], dict[str, Any]]):
        self._latent, self._conditions = latent, conditions

    @property
    def latent(self) -> torch.Tensor:
        return self._latent()

    @property
    def conditions(self) -> dict[str, Any]:
        return self._conditions()


def samples_of(
    data: Sequence[Sequence], latent: Callable[..., torch.Tensor], conditions: Callable[..., dict[str, Any]]
) -> list[Sample | LaterSample]:
    """A sample of each item of all `data`: latent(*items) and conditions(*items), made now where they are lists."""
    if any(map(is_stored, data)):
        def later(i: int, make: Callable) -> Any:
            return make(*(items[i] for items in data))

        return [
            LaterSample(functools.partial(later, i, latent), functools.partial(later, i, conditions))
            for i in range(len(data[0]))
        ]
    return [Sample(latent(*items), conditions(*items)) for items in zip(*data, strict=True)]


class Batches:
    """Seeded batches of `samples`, each from one bucket: samples that fit into one call of the model.

    A bucket is drawn in proportion to its size, then samples from it without repetition.
    """

    def __init__(self, samples: Sequence[Sample], size: int):
        self.size = size
        self.buckets: list[list[Sample]] = []
        firsts: list[Sample] = []
        for sample in samples:
            read = Sample(sample.latent, sample.conditions)
            place = next((i for i, first in enumerate(firsts) if same_bucket(first, read)), len(firsts))
            if place == len(firsts):
                firsts.append(read)
                self.buckets.append([])
            self.buckets[place].append(sample)

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
    """The weighted denoising loss of a model, at noise levels drawn uniformly from its own table of sigmas.

    A method's own `level_weight(sigma [B])` -> [B] multiplies it.
    """

    def __init__(
        self, denoiser: Denoiser, config: TrainingConfig,
        level_weight: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like,
    ):
        self.denoiser, self.level_weight = denoiser, level_weight
        self.prediction_loss = PredictionLoss(denoiser.model.model_sampling, config.min_snr_gamma)

    def losses(
        self, batch: Sequence[Sample], generator: torch.Generator, levels: Callable | None = None
    ) -> torch.Tensor:
        """The loss of each of B samples of one shape, [B], in one forward pass; `generator` draws noise and levels,
        these by `levels(B, generator)` where it is given.

        Those that other processes compute are 0, and but for the first they are not read.
        """
        noise, level = self.drawn((len(batch), *batch[0].latent.shape[1:]), generator, levels)

        def computed(part: slice) -> torch.Tensor:
            clean = torch.cat([sample.latent for sample in batch[part]])
            return self.loss_at(clean, [sample.conditions for sample in batch[part]], noise[part], level[part])

        return in_shares(len(batch), computed)

    def drawn(
        self, shape: Sequence[int], generator: torch.Generator, levels: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and noise levels of a batch of latents of this shape."""
        noise = torch.randn(tuple(shape), generator=generator)
        if levels is not None:
            return noise, levels(shape[0], generator)
        return noise, torch.randint(len(self.denoiser.sigmas), (shape[0],), generator=generator)

    def loss_at(
        self, clean: torch.Tensor, conditions: Any, noise: torch.Tensor, level: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss [B] with this noise, like `clean`, and these noise levels [B], indices into the sigmas.

        `weights` [B, 1, ...] are those of the cells, where they are not among the conditions.
        """
        if isinstance(conditions, list) and WEIGHTS in conditions[0]:
            weights = torch.cat([c[WEIGHTS] for c in conditions])
            conditions = [{key: value for key, value in c.items() if key != WEIGHTS} for c in conditions]
        device = self.denoiser.device
        clean, noise = clean.to(device), noise.to(device)
        sigma = self.denoiser.sigmas[level.to(device)]
        sampling = self.denoiser.model.model_sampling
        noisy = sampling.noise_scaling(sigma.reshape(-1, *[1] * (clean.ndim - 1)), noise, clean)
        denoised = self.denoiser.denoise(noisy, sigma, conditions)
        loss = self.prediction_loss(denoised, clean, sigma, None if weights is None else weights.to(device))
        return loss * self.level_weight(sigma)


class DenoisingObjective(Denoising):
    """The plain objective: the mean denoising loss of seeded batches of `samples`."""

    def __init__(self, denoiser: Denoiser, samples: Sequence[Sample], config: TrainingConfig, **options: Any):
        super().__init__(denoiser, config, **options)
        self.batches = Batches(samples, config.batch_size)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        return self.losses(self.batches.draw(generator), generator).mean()


def prediction_kind(model_sampling: Any, purpose: str, family: str = "") -> str:
    """noise, v, flow, or scaled flow, which is flow at the noisy latent's own scale, as Cosmos-Predict2's.

    Raises ValueError, naming `purpose`, the model's kind and its `family`, for another prediction.
    """
    kind = next((cls.__name__ for cls in type(model_sampling).__mro__ if cls.__name__ in _PREDICTIONS), "")
    if _PREDICTIONS.get(kind) is None:
        raise ValueError(
            f"{purpose} is not known for a model of {kind or 'this'} prediction{family and f', such as {family}'}: "
            "use one that predicts noise, v or flow"
        )
    return _PREDICTIONS[kind]


class PredictionLoss:
    """The mean square error of the prediction target, computed from the error of the denoised estimate.

    For ε-prediction |ε̂ - ε|² = |x̂ - x|² / σ²; for v-prediction with unit data variance
    |v̂ - v|² = |x̂ - x|² (σ² + 1) / σ²; for flow models |v̂ - v|² = |x̂ - x|² / σ², where a scaled flow's own level is
    σ / (1 + σ). `min_snr_gamma` weights it by
    min(SNR, γ) / SNR for ε and / (SNR + 1) for v (Hang et al., arXiv 2303.09556), as diffusers does.
    """

    def __init__(self, model_sampling: Any, min_snr_gamma: float):
        kind = prediction_kind(model_sampling, "training")
        self.flow, self.velocity, self.scaled = "flow" in kind, kind == "v", kind == "scaled flow"
        if min_snr_gamma and self.flow:
            raise ValueError("min_snr_gamma is for noise and v prediction: set it to 0 for a flow model")
        self.gamma = min_snr_gamma

    def __call__(
        self, denoised: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B] for latents [B, C, ...] and sigma [B], in fp32; a mean by `weights` [B, 1, ...] where there are any."""
        error = (denoised.float() - clean.float()).square()
        if weights is not None:
            error = error * (weights / weights.flatten(1).mean(1).reshape(-1, *[1] * (weights.ndim - 1)))
        error = error.flatten(1).mean(1)
        error = error / (sigma / (1 + sigma) if self.scaled else sigma).square()
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
