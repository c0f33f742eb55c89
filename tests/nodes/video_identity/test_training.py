"""The adapter's training through tiny models: what learns and what does not, gradients, resuming, inputs."""

import contextlib
import logging

import comfy.model_management
import folder_paths
import pytest
import torch
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.fingerprint import fingerprint
from pack.nodes.training import loop
from pack.nodes.training.checkpoints import FOLDER, Checkpoints
from pack.nodes.training.config import TrainingConfig
from pack.nodes.video_identity import method, training
from pack.nodes.video_identity.config import AdapterTrainingConfig
from pack.nodes.video_identity.training_nodes import UnderstudyTrainVideoIdentityAdapter
from support import published_wan, tiny_model
from support.video_identities import draw, person, relative, sample, shown

SHAPE = (1, 16, 2, 4, 4)


def wan(**options):
    return tiny_model.as_loaded(tiny_model.wan(num_layers=2, **options))


def config(**settings):
    return TrainingConfig(**{"steps": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **settings})


def trained(model, count=2, rank=4, checkpoints=None, resume_from="none", **settings):
    with torch.inference_mode():
        return training.train(
            model, [draw(i, *SHAPE) for i in range(count)], [draw(50 + i, 1, 16, 1, 4, 4) for i in range(count)],
            [tiny_model.conditioning(i) for i in range(count)], config(**settings), rank,
            checkpoints=checkpoints or Checkpoints("test", {}), resume_from=resume_from,
        )


def test_it_learns_in_the_published_names_and_leaves_the_model_as_it_was():
    model = wan()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.model.named_parameters()}
    options = dict(model.model_options["transformer_options"])
    adapter, loss_map = trained(model, steps=40)
    first, last = (torch.tensor(loss_map["loss"][part]).mean() for part in (slice(0, 10), slice(30, 40)))
    assert last < first
    tensors = adapter.tensors()
    assert list(tensors) == list(tiny_model.video_adapter(model))
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in tensors.values())
    # Every matrix of every block moved, but the last block's q: nothing reads its reference's own result.
    still = [key for key, tensor in tensors.items() if ".up." in key and not tensor.any()]
    assert still == ["blocks.1.self_attn.q_loras.up.weight"]
    for name, parameter in model.model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert model.model_options["transformer_options"] == options
    assert comfy.model_management.in_training is False
    result = sample(shown(model, person(adapter=adapter)), shape=SHAPE)
    assert not torch.equal(result, sample(model, shape=SHAPE))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_published_joint_model(monkeypatch, checkpointing):
    """One step from a random adapter: loss and every gradient, against autograd through the formulas in fp64."""
    def user_attention(function, q, k, v, heads, **kwargs):
        """Without a backward pass, as SageAttention is; training must not use it."""
        return function(q.detach(), k.detach(), v.detach(), heads, **kwargs)

    model = wan()
    model.model_options["transformer_options"]["optimized_attention_override"] = user_attention
    start = tiny_model.video_adapter(model, seed=4)
    seen = one_step(monkeypatch, start)
    trained(model, count=1, gradient_checkpointing=checkpointing)
    leaves, errors = published(model, start)
    check_gradients(seen, leaves, errors.mean())


def test_masks_of_a_face_weigh_the_published_loss_in_the_node(monkeypatch):
    """A face in the left half of all frames but the first; the rest counts a tenth."""
    model = wan()
    start = tiny_model.video_adapter(model, seed=4)
    seen = one_step(monkeypatch, start)
    masks = torch.zeros(5, 32, 32)
    masks[1:, :, :16] = 1
    video, reference = draw(0, *SHAPE), draw(50, 1, 16, 1, 4, 4)
    node(
        model, [{"samples": video}], [{"samples": reference}], [tiny_model.conditioning(0)], masks=masks,
        mask_floor=0.1, loss_weighting="even", batch_size=1,
    )
    leaves, errors = published(model, start)
    weights = torch.full((2, 4, 4), 0.1, dtype=torch.float64)
    weights[1, :, :2] = 1
    check_gradients(seen, leaves, (weights * errors).sum() / (weights.sum() * 16))


def one_step(monkeypatch, start):
    """Trainings begin at `start` and end with one step, whose loss and gradients go into the dictionary."""
    monkeypatch.setattr(method, "new_adapter", lambda *_a: method.adapter_from(start))
    seen = {}

    def step(objective, parameters, *_run):
        loss = objective(0, torch.Generator().manual_seed(3))
        loss.backward()
        seen.update({key: parameter.grad for key, parameter in parameters.items()}, loss=loss.detach())
        return [float(loss.detach())]

    monkeypatch.setattr(loop, "train", step)
    return seen


def published(model, start):
    """The adapter's matrices, and the published model's squared errors [1, C, T, H, W] with them, in fp64."""
    sampling = model.model.model_sampling
    generator = torch.Generator().manual_seed(3)
    torch.multinomial(torch.ones(1), 1, generator=generator)
    torch.randperm(1, generator=generator)
    noise = torch.randn(SHAPE, generator=generator)
    sigma = sampling.sigmas[torch.randint(len(sampling.sigmas), (1,), generator=generator)]
    clean = model.model.process_latent_in(draw(0, *SHAPE)).double()
    leaves = {key: tensor.double().requires_grad_() for key, tensor in start.items()}
    wan64 = published_wan.Wan(model.model.diffusion_model.state_dict(), 2, 32)
    wan64.a = leaves
    noisy = sigma * noise.double() + (1 - sigma) * clean
    velocity = wan64(
        noisy, sampling.timestep(sigma), tiny_model.conditioning(0)[0][0],
        model.model.process_latent_in(draw(50, 1, 16, 1, 4, 4)),
    )
    # Flow matching on the video's tokens alone: the velocity is noise minus picture.
    return leaves, (velocity - (noise.double() - clean)).square()


def check_gradients(seen, leaves, loss):
    """The last block's q is left out: nothing reads its reference's own result."""
    loss.backward()
    assert relative(seen["loss"].reshape(1), loss.detach().reshape(1)) < 1e-4
    for key, leaf in leaves.items():
        if key.startswith("blocks.1.self_attn.q"):
            assert seen[key] is None and not leaf.grad.any()
            continue
        assert relative(seen[key], leaf.grad) < 1e-3, key


def test_the_start_is_the_published_one():
    adapter = method.new_adapter(64, 3, 128, lambda i: i)
    tensors = adapter.tensors()
    assert all(not tensor.any() for key, tensor in tensors.items() if ".up." in key)
    downs = torch.stack([tensor.detach() for key, tensor in tensors.items() if ".down." in key])
    assert abs(float(downs.std()) * 128 - 1) < 0.02 and len({float(d.sum()) for d in downs}) == 9
    default = AdapterTrainingConfig()
    assert (default.steps, default.rank) == (3000, 128)


def test_the_seed_decides_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    key = FOLDER.name
    monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], {".safetensors"}))
    model = wan()
    whole, losses = trained(model, steps=4)
    again, _ = trained(model, steps=4)
    other, _ = trained(model, steps=4, seed=1)
    trained(model, steps=2, checkpoints=Checkpoints("run", {}), checkpoint_every=2)
    name = next((tmp_path / key).glob("*.safetensors")).name
    resumed, resumed_losses = trained(model, steps=4, checkpoints=Checkpoints("run", {}), resume_from=name)
    for k, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[k], tensor) and torch.equal(resumed.tensors()[k], tensor)
    assert resumed_losses == losses
    assert not all(torch.equal(a, b) for a, b in zip(whole.tensors().values(), other.tensors().values(), strict=True))


def node(model, latents, references, positive, **settings):
    values = {"steps": 2, "learning_rate": 1e-2, "rank": 2, "batch_size": 2, "seed": 0, "resume_from": "none"}
    values |= settings
    with torch.inference_mode():
        return UnderstudyTrainVideoIdentityAdapter.execute(
            latents, references, positive, model=[model],
            **{key: value if isinstance(value, list) else [value] for key, value in values.items()},
        ).result


def test_a_falling_rate_ends_at_the_last_step_and_another_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    key, model = FOLDER.name, wan()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], {".safetensors"}))
    data = [{"samples": draw(0, *SHAPE)}], [{"samples": draw(50, 1, 16, 1, 4, 4)}], [tiny_model.conditioning(0)]
    weights = {}
    for decay in (0.0, 0.5, 1.0):
        adapter, _ = node(model, *data, steps=4, decay=decay, checkpoint_every=3)
        weights[decay] = adapter.tensors()
    with torch.inference_mode():
        for decay in (0.5, 1.0):
            directly, _ = training.train(
                model, [data[0][0]["samples"]], [data[1][0]["samples"]], data[2],
                config(batch_size=2, decay=decay), 2, checkpoints=Checkpoints("test", {}), resume_from="none",
                loss_weighting="bell",
            )
            assert all(torch.equal(tensor, weights[decay][k]) for k, tensor in directly.tensors().items())
    assert not all(torch.equal(weights[0.0][k], tensor) for k, tensor in weights[0.5].items())
    falling = sorted((tmp_path / key).glob("*.safetensors"))[-1].name
    with pytest.raises(ValueError, match="steps"):
        node(model, *data, steps=5, decay=1.0, resume_from=falling)
    with pytest.raises(ValueError, match=r"decay 1\.0 and this run has 0\.5: set"):
        node(model, *data, steps=4, decay=0.5, resume_from=falling)
    with pytest.raises(ValueError, match=r"decay 1\.0 and this run has 0\.0; steps 4, unset in this run"):
        node(model, *data, steps=4, resume_from=falling)


def test_the_optimizer_is_part_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    key, model = FOLDER.name, wan()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], {".safetensors"}))
    data = [{"samples": draw(0, *SHAPE)}], [{"samples": draw(50, 1, 16, 1, 4, 4)}], [tiny_model.conditioning(0)]
    adamw, muon = (node(model, *data, steps=4, optimizer=name)[0].tensors() for name in ("AdamW", "Muon"))
    assert not all(torch.equal(adamw[name], muon[name]) for name in adamw)
    node(model, *data, steps=2, optimizer="Muon", checkpoint_every=2)
    stored = sorted((tmp_path / key).glob("*.safetensors"))[-1].name
    again = node(model, *data, steps=4, optimizer="Muon", resume_from=stored)[0].tensors()
    assert all(torch.equal(muon[name], again[name]) for name in muon)
    with pytest.raises(ValueError, match="optimizer 'Muon' and this run has 'AdamW': set it as it was"):
        node(model, *data, steps=4, resume_from=stored)


def test_consent_and_the_base_model_go_with_the_adapter():
    model, positive = wan(), tiny_model.conditioning(0)
    latents, references = [{"samples": draw(1, *SHAPE)}], [{"samples": draw(2, 1, 16, 1, 4, 4)}]
    consent = ConsentRecord("Anna", ("training",))
    adapter, _ = node(model, latents, references, [positive], consent=consent)
    assert adapter.consent == consent and adapter.base == fingerprint(model)
    assert node(model, latents, references, [positive])[0].consent is None


def test_a_backward_pass_keeps_little_of_the_reference_with_checkpointing():
    def retained_bytes(side, checkpointing):
        sizes, values = {}, ([draw(1, 1, 16, 3, 8, 8)], [draw(2, 1, 16, 1, side, side)], [tiny_model.conditioning(0)])

        def keep(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        settings = config(dtype="fp32", gradient_checkpointing=checkpointing)
        with training.prepared(wan(), *values, settings, 4) as (_, samples, denoiser):
            objective = training.DenoisingObjective(denoiser, samples, settings)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                objective(0, torch.Generator().manual_seed(1))
        return sum(sizes.values())

    reference = [retained_bytes(32, setting) - retained_bytes(2, setting) for setting in (False, True)]
    assert reference[1] < 0.5 * reference[0]


def test_the_memory_asked_for_grows_with_rank_and_reference(monkeypatch):
    asked = []
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda _m, memory_required, **_k: asked.append(
        memory_required
    ))
    for side, rank in ((4, 2), (4, 66), (32, 2)):
        with contextlib.suppress(Exception):  # nothing is loaded
            values = [draw(1, *SHAPE)], [draw(2, 1, 16, 1, side, side)], [tiny_model.conditioning(0)]
            with training.prepared(wan(), *values, config(), rank):
                pass
    assert asked[1] - asked[0] == 64 * 2 * 3 * 2 * 48 * 16  # rank, blocks, projections, matrices, width, bytes
    assert asked[2] > 4 * asked[0]


def test_texts_that_no_call_can_hold_together_are_trained_in_separate_batches():
    long = [[draw(1, 1, 12, tiny_model.CONTEXT), {}]]
    adapter, loss_map = node(
        wan(), [{"samples": draw(i, *SHAPE)} for i in range(4)], [{"samples": draw(50, 1, 16, 1, 4, 4)}],
        [tiny_model.conditioning(0), long, tiny_model.conditioning(1), long], steps=6, checkpoint_every=0,
    )
    assert len(loss_map["loss"]) == 6


def test_what_training_ignores_or_repeats_is_logged(caplog):
    one, text = {"samples": draw(50, 1, 16, 1, 4, 4)}, tiny_model.conditioning(0)
    videos = [{"samples": draw(i, *SHAPE)} for i in range(2)]
    with caplog.at_level(logging.INFO):
        node(wan(), videos, [one, one], [text], checkpoint_every=0)
    assert "one reference" not in caplog.text and "ignores" not in caplog.text
    model = wan()
    adapter = method.adapter_from(tiny_model.video_adapter(model))
    with caplog.at_level(logging.INFO):
        node(shown(model, person(adapter=adapter)), videos, [one], [text], checkpoint_every=0)
    assert "one reference is trained with all 2 videos" in caplog.text and "ignores the references" in caplog.text


def test_light_shapes_and_masks_of_videos_are_looked_at(caplog):
    """Three equally lit videos of noise, one far too long, with masks of the left half, of nothing and of all."""
    text, one = tiny_model.conditioning(0), {"samples": draw(50, 1, 16, 1, 4, 4)}
    videos = [{"samples": draw(i, 1, 16, 2, 4, 4 if i else 12) * 0} for i in range(3)]
    masks = [torch.zeros(5, 32, 32) for _ in range(3)]
    masks[0][..., :16], masks[2][:] = 1, 1
    node(wan(), videos, [one], [text], masks=masks, mask_floor=0.1, steps=1, checkpoint_every=0)
    assert "latents: all 3 pictures have the same brightness" in caplog.text
    assert "latents: a video of 96 x 32 pixels is very long" in caplog.text
    assert "masks: 2 of 3 is empty, so nothing of these videos is learned" in caplog.text
    assert "masks: 3 of 3 is nearly all 1" in caplog.text
    caplog.clear()
    lit = [{"samples": video["samples"] + (i - 1) * 2.0} for i, video in enumerate(videos)]
    node(wan(), lit, [one], [text], steps=1, checkpoint_every=0)
    assert "same brightness" not in caplog.text and "masks:" not in caplog.text


def test_the_node_takes_batches_and_lists_and_one_for_all():
    UnderstudyTrainVideoIdentityAdapter.GET_SCHEMA().validate()
    schema = UnderstudyTrainVideoIdentityAdapter.define_schema()
    assert [widget.id for widget in schema.inputs][:10] == [
        "model", "latents", "references", "positive", "steps", "learning_rate", "rank", "batch_size", "seed",
        "resume_from",
    ]
    assert [output.io_type for output in schema.outputs] == ["UNDERSTUDY_VIDEO_ADAPTER", "LOSS_MAP"]
    model = wan()
    one = {"samples": draw(50, 1, 16, 1, 4, 4)}
    text = tiny_model.conditioning(0)
    batch = {"samples": torch.cat([draw(i, *SHAPE) for i in range(2)])}
    listed = [{"samples": draw(i, *SHAPE)} for i in range(2)]
    adapter, loss_map = node(model, [batch], [one], [text], checkpoint_every=0)
    same, _ = node(model, listed, [one, one], [text, text], checkpoint_every=0)
    assert len(loss_map["loss"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(adapter.tensors().values(), same.tensors().values(), strict=True))
    mixed = [*listed, {"samples": draw(5, 1, 16, 1, 6, 4)}]
    node(model, mixed, [one], [text], checkpoint_every=0)
    for latents, references, positive, message in (
        (mixed, [one, one], [text], "references has 2 items for 3 videos"),
        (listed, [one], [text] * 3, "positive has 3 items for 2 videos"),
        (listed, [listed[0]], [text], "single pictures of one size"),
        (listed, [one, {"samples": draw(1, 1, 16, 1, 6, 6)}], [text], "single pictures of one size"),
        ([{"samples": torch.full(SHAPE, float("nan"))}], [one], [text], "latents holds NaN"),
        ([{"samples": draw(1, 1, 48, 2, 4, 4)}], [one], [text], "latents has 48 channels .* VAE of this model"),
        (listed, [{"samples": draw(1, 1, 4, 1, 4, 4)}], [text], "references has 4 channels and the model"),
        (listed, [{"samples": draw(1, 1, 16, 4, 4)}], [text], "references has shape .* another kind of model"),
        ([{"samples": draw(1, 1, 16, 4, 4)}], [one], [text], "latents has shape .* with the VAE of this model"),
        ([{"samples": torch.ones(1, 16, 50)}], [one], [text], "latents is not an image or video latent"),
        ([{"samples": torch.ones(0, *SHAPE[1:])}], [one], [text], "latents is an empty batch"),
        (listed, [{"samples": torch.zeros(1, 16, 1, 4, 4)}], [text], "references is all zero"),
        (listed, [one], [[]], "positive holds an empty conditioning"),
    ):
        with pytest.raises(ValueError, match=message):
            node(model, latents, references, positive)
    with pytest.raises(ValueError, match="needs a Wan"):
        node(tiny_model.picture(), listed, [one], [text])


def test_the_bell_weights_the_loss_at_levels_of_shift_5(monkeypatch):
    """Against the loss written out at the levels that the objective drew."""
    seen = []
    original = training.DenoisingObjective.loss_at

    def noted(self, clean, conditions, noise, level, weights=None):
        loss = original(self, clean, conditions, noise, level, weights)
        sigma = self.denoiser.sigmas[level]
        plain = self.level_weight
        self.level_weight = torch.ones_like
        seen.append((sigma, loss.detach(), original(self, clean, conditions, noise, level, weights).detach()))
        self.level_weight = plain
        return loss

    monkeypatch.setattr(training.DenoisingObjective, "loss_at", noted)
    model = wan()
    for weighting in ("even", "bell"):
        seen.clear()
        with torch.inference_mode():
            training.train(
                model, [draw(1, *SHAPE)], [draw(2, 1, 16, 1, 4, 4)], [tiny_model.conditioning(1)], config(steps=3), 4,
                checkpoints=Checkpoints("test", {}), resume_from="none", loss_weighting=weighting,
            )
        for sigma, loss, plain in seen:
            expected = plain * method.bell_weight(sigma) if weighting == "bell" else plain
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        table = method.training_sigmas() if weighting == "bell" else model.get_model_object("model_sampling").sigmas
        assert all(torch.isclose(table.float(), sigma.float().cpu(), rtol=1e-6, atol=0).any() for sigma, *_ in seen)
