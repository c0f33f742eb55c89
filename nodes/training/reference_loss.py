"""The loss on what a training is about, before and after it, always with the same noise and noise levels."""

from collections.abc import Callable, Sequence

import torch

from .objective import Denoising, Sample
from .seeds import seed_for

# Ours: enough to see that something was learned; each costs one forward pass before and one after the training.
_SAMPLES = 6
_LEVELS = (0.2, 0.5, 0.8)  # of the model's table of sigmas

# loss_at(index, noise seed, fraction of the table of sigmas) -> the error of one sample, [1]
LossAt = Callable[[int, int, float], torch.Tensor]


class ReferenceLoss:
    """The mean error over at most a few of `count` samples, spread evenly, as what is trained is now."""

    def __init__(self, count: int, loss_at: LossAt):
        self.indices = sorted({i * count // min(count, _SAMPLES) for i in range(min(count, _SAMPLES))})
        self.loss_at = loss_at

    @classmethod
    def of_samples(cls, denoising: Denoising, samples: Sequence[Sample]) -> "ReferenceLoss":
        """That of samples in a model's space, with their own conditions."""

        def loss_at(index: int, seed: int, place: float) -> torch.Tensor:
            sample = samples[index]
            noise, level = noise_and_level(denoising, sample.latent, seed, place)
            return denoising.loss_at(sample.latent, [sample.conditions], noise, level)

        return cls(len(samples), loss_at)

    def __call__(self) -> float:
        """Without a graph, and without a number from the run's own generators."""
        with torch.no_grad():
            errors = [
                self.loss_at(index, seed_for(0, "reference loss", index * len(_LEVELS) + i), place)
                for index in self.indices for i, place in enumerate(_LEVELS)
            ]
        return float(torch.cat([error.flatten().float().cpu() for error in errors]).mean())


def noise_and_level(
    denoising: Denoising, latent: torch.Tensor, seed: int, place: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise like `latent` and a noise level [1], as `Denoising.loss_at` takes them."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    return noise, torch.tensor([int(place * (len(denoising.denoiser.sigmas) - 1))])
