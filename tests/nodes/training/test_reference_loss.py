"""The loss on the references: the definition, the same noise each time, and what a node says of it."""

import logging
import re

import pytest
import torch
from pack.nodes.training import picture_training, runs
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.objective import Denoising, Sample
from pack.nodes.training.reference_loss import ReferenceLoss
from pack.nodes.training.seeds import seed_for
from pack.nodes.training.session import session
from support import tiny_model

MODEL = tiny_model.as_loaded(tiny_model.picture())
CONFIG = TrainingConfig(steps=1, learning_rate=1e-2)
SHAPE = (1, 4, 8, 8)


def latent(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_error_of_the_predicted_noise():
    with torch.inference_mode(), session(MODEL, SHAPE, CONFIG) as denoiser:
        sample = Sample(latent(1), denoiser.prepare(tiny_model.conditioning(0), latent(1)))
        ours = ReferenceLoss.of_samples(Denoising(denoiser, CONFIG), [sample])
        errors = []
        for i, place in enumerate((0.2, 0.5, 0.8)):
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed_for(0, "reference loss", i)))
            sigma = denoiser.sigmas[int(place * 999)].reshape(1)
            with torch.no_grad():
                noisy = sample.latent + sigma * noise
                denoised = denoiser.denoise(noisy, sigma, [sample.conditions])
            errors.append(((noisy - denoised) / sigma - noise).square().mean())
        assert ours() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)  # sigma² of up to 200 in fp32
        assert ours() == ours(), "the same noise each time"


def test_a_few_samples_are_spread_evenly():
    assert ReferenceLoss(100, None).indices == [0, 16, 33, 50, 66, 83]
    assert ReferenceLoss(2, None).indices == [0, 1]


def test_a_training_says_both_losses_and_trains_the_same(caplog, monkeypatch):
    def train(steps=40):
        with torch.inference_mode():
            return picture_training.train_on_pictures(
                MODEL, [latent(1), latent(2)], [tiny_model.conditioning(i) for i in range(2)],
                TrainingConfig(steps=steps, learning_rate=1e-2, checkpoint_every=0), LoraConfig(rank=4),
                checkpoints=Checkpoints("test", {}), resume_from="none",
            )

    with caplog.at_level(logging.INFO):
        lora, losses = train()
    (line,) = [message for message in caplog.messages if "loss on the references" in message]
    after, before = map(float, re.search(r"references ([\d.]+), and ([\d.]+) before", line).groups())
    assert after < before
    monkeypatch.setattr(runs, "_measured", lambda reference_loss: None)
    plain, plain_losses = train()
    assert losses == plain_losses and all(torch.equal(lora[key], plain[key]) for key in lora)


def run(reference_loss, caplog):
    weight = torch.nn.Parameter(torch.ones(2))
    with caplog.at_level(logging.INFO):
        runs.run(
            lambda _step, _generator: weight.square().sum(), {"weight": weight}, CONFIG, torch.device("cpu"),
            reference_loss=reference_loss,
        )
    records = [(record.levelname, record.getMessage()) for record in caplog.records]
    return [(level, message) for level, message in records if "references" in message]


def test_a_training_that_learned_nothing_is_a_warning(caplog):
    ((level, message),) = run(iter([0.5, 0.6]).__next__, caplog)
    assert level == "WARNING" and "learned nothing" in message


def test_a_loss_that_cannot_be_measured_ends_no_run(caplog):
    def fails():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    ((level, message),) = run(fails, caplog)
    assert level == "WARNING" and "could not be measured: CUDA out of memory" in message
