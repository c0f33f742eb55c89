"""Shares of a batch: together their gradients are the whole batch's, and each reads its own samples alone."""

import pytest
import torch
from pack.nodes.identity_prior.method import PriorObjective
from pack.nodes.training import parallel
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import Batches, Denoising, DenoisingObjective, LaterSample
from support import every_training, tiny_model


class Driver(parallel.Engine):
    """Processes and shares that are only counted."""

    def __init__(self, processes, accumulation=1):
        self.processes, self.accumulation = processes, accumulation


@pytest.mark.parametrize(("batch", "samples", "told"), [
    (1, 800, "batch_size is 1, and a step is divided into 8 parts, 2 in each of 4 processes.*set batch_size to 8 or"),
    (7, 800, "batch_size is 7, .*into 8 parts"), (8, 5, "there are 5 samples to train on, .*into 8 parts"),
])
def test_a_step_with_fewer_samples_than_parts_is_refused_in_words(batch, samples, told):
    parallel.check_shares(batch, samples)  # one process
    with parallel.driven_by(Driver(4, 2)):
        parallel.check_shares(8, 8)
        with pytest.raises(ValueError, match=told):
            parallel.check_shares(batch, samples)


@pytest.mark.parametrize("name", ["prior", "generator", "adapter"])
def test_every_divided_training_refuses_spare_processes(name):
    with parallel.driven_by(Driver(64)), pytest.raises(ValueError, match="a step is divided into 64 parts"):
        every_training.trained(name)


class Scaled:
    """A denoiser of one weight."""

    def __init__(self):
        self.model = tiny_model.picture().model
        self.device, self.sigmas = torch.device("cpu"), self.model.model_sampling.sigmas
        self.weight = torch.nn.Parameter(torch.ones(1))

    def denoise(self, noisy, sigma, conditions):
        return self.weight * noisy


def later(read, names):
    def latent(name):
        read.append(name)
        return torch.full((1, 4, 2, 2), float(name))

    return [LaterSample(lambda name=name: latent(name), dict) for name in names]


def made(kind, read):
    """The denoiser and an objective on batches of 4, of a prior two of which are of the class."""
    denoiser, config = Scaled(), TrainingConfig(steps=1, learning_rate=1e-3, batch_size=4)
    if kind == "plain":
        return denoiser, DenoisingObjective(denoiser, later(read, range(6)), config)
    sets = (Batches(later(read, names), 2) for names in (range(3), range(10, 13)))
    return denoiser, PriorObjective(Denoising(denoiser, config).losses, *sets, 0.5)


@pytest.mark.parametrize("kind", ["plain", "prior"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_add_up_and_read_their_own(kind, count):
    read = []
    denoiser, objective = made(kind, read)
    read.clear()
    objective(0, torch.Generator().manual_seed(1)).backward()
    whole, drawn = denoiser.weight.grad.clone(), set(read)
    assert len(drawn) == 4 and whole
    denoiser.weight.grad = None
    for i in range(count):
        read.clear()
        with parallel.computing(parallel.Share(i, count)):
            objective(0, torch.Generator().manual_seed(1)).backward()
        # Beside its own the first of each set, which tells the shape.
        assert len(set(read)) <= -(-4 // count) + (1 if kind == "plain" else 2)
    torch.testing.assert_close(denoiser.weight.grad, whole)
