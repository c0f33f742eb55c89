"""Training every weight: the published step, an unchanged input model, differences that ComfyUI's loader applies."""

import comfy.sd
import pytest
import torch
from pack.nodes.training import objective, picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.seeds import seed_for
from pack.nodes.training.session import session
from pack.nodes.training.whole_network import WholeNetwork
from support import tiny_model

RATE, SHAPE = 1e-4, (1, 4, 8, 8)


def inference_model():
    return tiny_model.as_loaded(tiny_model.picture())


def config(**settings):
    return TrainingConfig(**{"steps": 4, "learning_rate": RATE, "checkpoint_every": 0, **settings})


def latents():
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def trained(model, checkpoints=None, resume_from="none", **settings):
    with torch.inference_mode():
        return picture_training.train_on_pictures(
            model, latents(), [tiny_model.conditioning(i) for i in range(2)],
            config(weight_decay=0.0, **settings), None,
            checkpoints=checkpoints or Checkpoints("test", {}), resume_from=resume_from,
        )


def test_it_learns_what_a_plain_loop_over_the_weights_learns():
    """Adam on the model's parameters, written out, gives the same differences."""
    actual, loss_map = trained(inference_model(), steps=3)
    plain = tiny_model.picture()
    network = plain.model.diffusion_model
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    with session(plain, SHAPE, config(steps=3)) as denoiser:
        samples = [
            objective.Sample(denoiser.model.process_latent_in(x), denoiser.prepare(tiny_model.conditioning(i), x))
            for i, x in enumerate(latents())
        ]
        goal = objective.DenoisingObjective(denoiser, samples, config(steps=3))
        weights = [weight.requires_grad_() for weight in network.parameters()]
        optimiser = torch.optim.Adam(weights, lr=RATE)
        for step in range(3):
            optimiser.zero_grad()
            loss = goal(step, torch.Generator().manual_seed(seed_for(0, "step", step)))
            assert loss.item() == pytest.approx(loss_map["loss"][step], rel=1e-5)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
    assert len(actual) == len(before)
    for name, weight in network.named_parameters():
        stem, _, leaf = name.rpartition(".")
        difference = actual[f"diffusion_model.{stem}.{'diff_b' if leaf == 'bias' else 'diff'}"]
        torch.testing.assert_close(difference, weight.detach() - before[name], rtol=0.02, atol=RATE / 50)
        # Adam's step is at most about the learning rate.
        assert 0 < difference.abs().max() <= 3.3 * RATE


@pytest.mark.parametrize("model", [inference_model(), tiny_model.picture(dtype=torch.bfloat16), tiny_model.video()])
def test_the_model_keeps_its_weights(model):
    before = dict(model.model.named_parameters())
    values = {name: weight.clone() for name, weight in before.items()}
    video = hasattr(model.model.diffusion_model, "blocks")
    shape = (1, 16, 3, 4, 4) if video else SHAPE
    with torch.inference_mode():
        differences, loss_map = picture_training.train_on_pictures(
            model, [torch.randn(shape)], [tiny_model.conditioning(0)], config(steps=20), None,
            checkpoints=Checkpoints("test", {}), resume_from="none",
        )
        patched, _ = comfy.sd.load_lora_for_models(model, None, differences, 1.0, 0)
    assert len(patched.patches) == len(differences) == sum(1 for _ in model.model.diffusion_model.parameters())
    assert all(torch.isfinite(torch.tensor(loss_map["loss"])))
    for name, weight in model.model.named_parameters():
        assert weight is before[name]
        assert torch.equal(weight, values[name])


def test_the_native_loader_gives_what_was_trained():
    model = inference_model()
    x, sigma = torch.randn(SHAPE), torch.tensor([2.0])
    with session(model, SHAPE, config(), whole=True) as denoiser, torch.no_grad():
        conditions = [denoiser.prepare(tiny_model.conditioning(0), x)]
        plain = denoiser.denoise(x, sigma, conditions)
        whole = WholeNetwork(denoiser.network)
        for i, weight in enumerate(whole.parameters().values()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)), alpha=0.02)
        with whole.attached():
            expected = denoiser.denoise(x, sigma, conditions)
        weights = picture_training.lora_model(whole, denoiser.model.model_config.unet_config)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)
    with session(patched, SHAPE, config()) as denoiser, torch.no_grad():
        actual = denoiser.denoise(x, sigma, conditions)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Kept:
    """Checkpoints in memory."""

    def __init__(self):
        self.states = []

    def save(self, state):
        self.states.append(state)

    def resume(self, name):
        return None if name == "none" else self.states[int(name)]


def test_a_resumed_run_equals_the_whole_one():
    whole, _ = trained(inference_model(), steps=6)
    memory = Kept()
    trained(inference_model(), memory, steps=4, checkpoint_every=3)
    assert memory.states[0].step == 3
    actual, _ = trained(inference_model(), memory, "0", steps=6)
    assert actual.keys() == whole.keys()
    assert all(torch.equal(actual[key], whole[key]) for key in whole)
