"""Weights that stream in: the same training bit for bit, and no weight is kept for the backward pass."""

import pytest
import torch
from pack.nodes.training import picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.objective import DenoisingObjective, Sample
from pack.nodes.training.session import session
from support import every_training, fusion_trainings, tiny_model

SHAPES = {"picture": (1, 4, 8, 8), "wan": (1, 16, 2, 4, 4)}
MODELS = {"picture": tiny_model.as_loaded(tiny_model.picture()), "wan": tiny_model.as_loaded(tiny_model.wan())}


def config(**settings):
    return TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 0, "batch_size": 2, **settings})


def trained(name, **settings):
    latents = [torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.inference_mode():
        return picture_training.train_on_pictures(
            MODELS[name], latents, [tiny_model.conditioning(i) for i in range(3)], config(**settings),
            LoraConfig(rank=2), checkpoints=Checkpoints("test", {}), resume_from="none",
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_training_is_the_same_bit_for_bit(name, checkpointing):
    plain, losses = trained(name)
    forwards = {id(module): module.__dict__.get("forward") for module in MODELS[name].model.modules()}
    streamed, same_losses = trained(name, offload=True, gradient_checkpointing=checkpointing)
    assert losses == same_losses
    assert all(torch.equal(plain[key], streamed[key]) for key in plain)
    assert forwards == {id(module): module.__dict__.get("forward") for module in MODELS[name].model.modules()}


@pytest.mark.parametrize("stored", [{}, every_training.FP8], ids=["fp32", "fp8"])
@pytest.mark.parametrize("name", every_training.TRAININGS)
def test_every_training_streams_bit_for_bit(name, stored):
    """Also on a base of 8 bits. The combiner's encoder: tests/nodes/fusion_embedding/test_paths.py."""
    plain, losses = every_training.trained(name, stored)
    streamed, same_losses = every_training.trained(name, stored, offload=True)
    assert losses == same_losses and every_training.same(plain, streamed)


def kept_weights(name, **settings):
    """How many of the model's weights autograd keeps for the backward pass of a step."""
    with session(MODELS[name], SHAPES[name], config(**settings)) as denoiser:
        conditions = denoiser.prepare(tiny_model.conditioning(0), torch.zeros(SHAPES[name]))
        latent = torch.zeros(SHAPES[name]).requires_grad_()
        objective = DenoisingObjective(denoiser, [Sample(latent, conditions)], config())
        weights = {tensor.data_ptr() for tensor in denoiser.network.parameters()}
        kept = set()

        def note(tensor):
            kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(0, torch.Generator().manual_seed(0))
        loss.backward()
        return len(weights & kept)


@pytest.mark.parametrize("name", MODELS)
def test_no_matrix_is_kept_until_the_backward_pass(name):
    assert kept_weights(name) > 10
    assert kept_weights(name, offload=True) == 0


def test_what_a_run_needs_and_what_lowers_it_are_told_before_its_first_step(caplog):
    """The numbers: test_memory.py."""
    with caplog.at_level("INFO"):
        trained("picture")
        trained("picture", offload=True, gradient_checkpointing=True, batch_size=1)
        fusion_trainings.combined(train_encoder=True, steps=1, offload=True)
    first, second, encoder = [message for message in caplog.messages if "GiB by estimate" in message]
    assert first.endswith("; offload, gradient_checkpointing, a smaller batch_size, a model in fp8 would lower it")
    assert "weights 0.00" in second and "would lower" not in second
    assert encoder.endswith("; gradient_checkpointing, a smaller batch_size would lower it")


def test_a_whole_network_is_not_offloaded():
    with pytest.raises(ValueError, match="offload is for weights that are not trained, and whole_unet trains all"):
        with session(MODELS["picture"], SHAPES["picture"], config(offload=True), whole=True):
            pass
