"""Training an identifier through tiny models of ComfyUI's own classes: surroundings, contrasts, phases, resuming."""

import logging

import comfy.model_management
import pytest
import torch
from pack.nodes.action_identifier import encoding, sampling, training
from pack.nodes.action_identifier.config import EVERY
from pack.nodes.training import loop
from pack.nodes.training.session import session
from support import action_identifiers, tiny_clip, tiny_model
from support.action_trainings import (
    CLIP,
    MODEL,
    SUBJECTS,
    MemoryCheckpoints,
    action,
    config,
    exemplars,
    latents,
    same,
    train,
)


@pytest.fixture(autouse=True)
def quickly_drawn(monkeypatch):
    monkeypatch.setattr(training, "_CONTRAST_STEPS", 2)


def test_surroundings_that_cannot_be_learned_say_what_to_change():
    pictures = exemplars(contrasts=False)
    pictures.latents[0][..., 0, 0] = float("inf")
    with pytest.raises(loop.TrainingDiverged, match="surroundings .* connect contrast_images"):
        train(pictures=pictures)


def test_contrasts_of_a_checkpoint_lie_where_the_pictures_do():
    run = config()
    encoder = training.TextEncoder(CLIP)
    with session(sampling.apply(MODEL, 1.0), (3, 4, 8, 8), run, other_models=[encoder.patcher]) as denoiser:
        trainer = training._ActionTrainer(denoiser, encoder, exemplars(contrasts=False), action(), run)
        saved = {f"contrast.{i}": latent.double() for i, latent in enumerate(latents())}
        actual = trainer.contrasts(loop.State(3, [0.0] * 3, saved))
    assert all(latent.dtype == torch.float32 for latent in actual)


def test_an_action_s_prompt_is_refused_by_a_training_that_reads_plain_ones():
    attached = action_identifiers.prompt(CLIP, [action_identifiers.identifier(MODEL)])
    with session(MODEL, (1, 4, 8, 8), config()) as denoiser:
        conditions = denoiser.prepare(attached, latents(1)[0])
        with pytest.raises(ValueError, match="use CLIP Text Encode for a plain prompt"):
            denoiser.denoise(latents(1)[0], denoiser.sigmas[:1], [conditions])


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1", "SDXL", "flow", "Wan"])
def test_every_kind_of_model_learns(kind):
    shape = (1, 16, 1, 4, 4) if kind == "Wan" else (1, 4, 8, 8)
    model = {
        "SDXL": tiny_model.xl, "flow": lambda: tiny_model.picture(flow=True), "Wan": tiny_model.wan,
    }.get(kind, tiny_model.picture)()
    model = tiny_model.as_loaded(action_identifiers.reading(model) if kind != "Wan" else model)
    encoders = kind if kind in tiny_clip.WIDTHS else "SD 1.5"
    clip = tiny_clip.as_loaded(tiny_clip.clip(encoders))
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    actual, loss_map = train(model, clip, exemplars(shape=shape), steps=2)
    places = action_identifiers.places(model)
    first = encoding.word_vectors(clip, "dancing")
    assert actual.places == places and len(loss_map["loss"]) == 2
    for name, width in tiny_clip.WIDTHS[encoders].items():
        tokens = actual.tokens[name]
        assert tokens.shape == (len(places), len(first[name]), width) and tokens.dtype == torch.float32
        assert (tokens != first[name]).flatten(1).any(1).all(), "a layer learned nothing"
    assert same(before, dict(model.model.named_parameters()))
    attached = action_identifiers.prompt(clip, [actual])
    assert torch.isfinite(attached[0][1]["model_conds"][sampling.KEY].contexts).all()


def test_it_learns_with_and_without_triples():
    for settings in (action(), action(merge=EVERY), action(merge=EVERY, layer_wise=False)):
        actual, loss_map = train(settings=settings, steps=30, learning_rate=0.1)
        first, last = (torch.tensor(loss_map["loss"][part]).mean() for part in (slice(0, 10), slice(20, 30)))
        assert last < first
        assert len(actual.tokens["l"]) == (4 if settings.layer_wise else 1)
        assert bool(actual.places) == settings.layer_wise


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2, 2), (9, len(SUBJECTS))])
def test_without_triples_a_step_is_one_pass_of_a_batch(asked, taken, monkeypatch):
    sizes, original = [], training.Denoising.loss_at

    def loss_at(self, clean, conditions, noise, level):
        assert len(set(level.tolist())) == len(level), "each picture has its own noise level"
        if torch.is_grad_enabled():  # a step
            sizes.append(len(clean))
        return original(self, clean, conditions, noise, level)

    monkeypatch.setattr(training.Denoising, "loss_at", loss_at)
    train(settings=action(merge=EVERY), steps=2, batch_size=asked)
    assert sizes == [taken] * 2


def test_noise_levels_are_weighed_if_asked():
    plain, weighed = (train(steps=3, min_snr_gamma=gamma) for gamma in (0.0, 0.001))  # below every level's SNR
    assert not same(plain[0].tokens, weighed[0].tokens)
    assert all(loss < before for before, loss in zip(plain[1]["loss"], weighed[1]["loss"], strict=True))


def test_gradient_checkpointing_learns_the_same():
    plain, recomputed = (train(gradient_checkpointing=on)[0].tokens["l"] for on in (False, True))
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_the_same_seed_learns_the_same_and_another_does_not():
    one, other, third = (train(pictures=exemplars(contrasts=False), seed=seed)[0].tokens for seed in (1, 1, 2))
    assert same(one, other) and not same(one, third)


def test_contexts_are_trained_and_contrasts_drawn_with_another_action():
    run = config()
    encoder = training.TextEncoder(CLIP)
    with session(sampling.apply(MODEL, 1.0), (3, 4, 8, 8), run, other_models=[encoder.patcher]) as denoiser:
        trainer = training._ActionTrainer(denoiser, encoder, exemplars(contrasts=False), action(), run)
        contexts = trainer._train_contexts()
        drawn = trainer.contrasts(None)
    means = [encoding.word_vectors(CLIP, text)["l"].mean(0) for text in (
        "a cat on a beach dancing", "a (red:1.2) robot dancing", "a dog dancing at night"
    )]
    for context, mean in zip(contexts, means, strict=True):
        moved = (context["l"][0, 0] - mean).abs()
        # Two steps of Adam of 5e-3 each, the decay beside them.
        assert 1e-3 < moved.max() < 1.2e-2
    assert [latent.shape for latent in drawn] == [(1, 4, 8, 8)] * 3
    assert all(torch.isfinite(latent).all() for latent in drawn) and not torch.equal(drawn[0], drawn[1])


def test_the_log_says_which_phase_it_is(caplog):
    with caplog.at_level(logging.INFO):
        train(pictures=exemplars(contrasts=False))
    ours = [record.getMessage() for record in caplog.records if "[Understudy]" in record.getMessage()]
    phases = [line.removeprefix("[Understudy] ").split(" step ")[0] for line in ours]
    drawn = [f"drawing contrast {i} of 3" for i in (1, 2, 3)]
    # Two steps a context, three of the action.
    assert phases[0].startswith("training: needs about")
    assert phases[1:-2] == 6 * ["contexts:"] + drawn + 3 * ["action:"]
    assert phases[-2].startswith("training: loss on the references")
    assert phases[-1].startswith("training: peak memory")


def test_a_resumed_run_equals_the_whole_one_and_draws_no_contrast_again(monkeypatch):
    pictures = exemplars(contrasts=False)
    whole, losses = train(pictures=pictures, steps=5)
    saved = MemoryCheckpoints()
    train(pictures=pictures, steps=4, checkpoints=saved, checkpoint_every=3)
    assert {f"contrast.{i}" for i in range(3)} <= saved.states[0].tensors.keys()
    monkeypatch.setattr(training._ActionTrainer, "_train_contexts", lambda self: pytest.fail("drawn again"))
    resumed, again = train(pictures=pictures, steps=5, checkpoints=MemoryCheckpoints(saved.states[0]))
    assert same(resumed.tokens, whole.tokens) and losses == again


@pytest.mark.parametrize("stop", range(1, 40, 6))
def test_a_cancelled_run_leaves_comfyui_as_it_was_in_every_phase(stop, monkeypatch):
    """The button is pressed at ComfyUI's nth look at it: in contexts, contrasts or tokens."""
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        if looks == stop:
            raise comfy.model_management.InterruptProcessingException

    before = list(CLIP.cond_stage_model.parameters())
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)
    saved = MemoryCheckpoints()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(pictures=exemplars(contrasts=False), steps=60, checkpoints=saved)
    assert comfy.model_management.in_training is False and looks == stop
    assert all(a is b for a, b in zip(before, CLIP.cond_stage_model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in CLIP.cond_stage_model.modules())
    assert len(saved.states) <= 1


def test_previews_read_the_tokens_and_change_nothing():
    seen = []

    def preview(denoiser, clip, actions):
        positive = sampling.attach_contexts(*encoding.encode(clip, "a <action> cat", actions), actions)
        seen.append(training.drawing.sample_in_training(
            denoiser, positive, clip.encode_from_tokens_scheduled(clip.tokenize("")), (1, 4, 8, 8), 0, 2
        ))

    watched, _ = train(steps=4, preview=preview, preview_every=2, learning_rate=5e-2)
    alone, _ = train(steps=4, learning_rate=5e-2)
    assert same(watched.tokens, alone.tokens)
    assert len(seen) == 2 and not torch.equal(*seen)


@pytest.mark.parametrize("kind", ["SD 1.5", "SD 2.1", "SDXL", "Wan"])
def test_behind_the_encoder_offsets_are_learned_and_the_word_stays(kind):
    shape = (1, 16, 1, 4, 4) if kind == "Wan" else (1, 4, 8, 8)
    model = {"SDXL": tiny_model.xl, "Wan": tiny_model.wan}.get(kind, tiny_model.picture)()
    model = tiny_model.as_loaded(action_identifiers.reading(model) if kind != "Wan" else model)
    clip = tiny_clip.as_loaded(tiny_clip.clip(kind if kind in tiny_clip.WIDTHS else "SD 1.5"))
    settings = action(behind_encoder=True, lowest_noise=0.5)
    actual, _ = train(model, clip, exemplars(shape=shape), settings, steps=2)
    places, first = action_identifiers.places(model), encoding.word_vectors(clip, "dancing")
    assert all(torch.equal(tokens, first[name].expand_as(tokens)) for name, tokens in actual.tokens.items())
    plain = action_identifiers.plain(clip, "a")[0][0]
    assert actual.offsets.shape == (len(places), len(next(iter(first.values()))), plain.shape[-1])
    assert actual.offsets.flatten(1).any(1).all(), "a layer learned nothing"


def test_a_prompt_is_read_in_training_as_it_will_be_in_use():
    run, settings = config(), action(behind_encoder=True)
    encoder = training.TextEncoder(CLIP)
    learned = train(settings=settings, steps=3)[0]
    with session(sampling.apply(MODEL, 1.0), (3, 4, 8, 8), run, other_models=[encoder.patcher]) as denoiser:
        trainer = training._ActionTrainer(denoiser, encoder, exemplars(), settings, run)
        prompt = trainer._prompt("a (red <action>:1.4) robot", trainer.word_tokens(1), "<action>")
        expected = trainer.contexts(prompt, "<action>", {"offsets": learned.offsets})
    _, (actual,) = encoding.encode(CLIP, "a (red <action>:1.4) robot", [learned])
    torch.testing.assert_close(actual, expected.cpu(), rtol=1e-5, atol=1e-5)


def test_behind_the_encoder_a_resumed_run_equals_the_whole_one_and_the_loss_falls():
    settings, run = action(behind_encoder=True, lowest_noise=0.5), {"steps": 40, "learning_rate": 0.3, "decay": 1.0}
    saved = MemoryCheckpoints()
    whole, losses = train(settings=settings, checkpoints=saved, checkpoint_every=15, **run)
    assert sum(losses["loss"][-10:]) < sum(losses["loss"][:10])
    resumed, again = train(settings=settings, checkpoints=MemoryCheckpoints(saved.states[0]), **run)
    assert torch.equal(resumed.offsets, whole.offsets) and losses["loss"] == again["loss"]


@pytest.mark.parametrize("merge", ["union", EVERY])
def test_noise_is_drawn_from_the_range_that_is_asked_for(merge, monkeypatch):
    seen, original = [], training.Denoising.loss_at

    def loss_at(self, clean, conditions, noise, level):
        if torch.is_grad_enabled():  # a step
            seen.extend(level.tolist())
        return original(self, clean, conditions, noise, level)

    monkeypatch.setattr(training.Denoising, "loss_at", loss_at)
    train(settings=action(merge=merge, lowest_noise=0.5, highest_noise=0.75), steps=40, batch_size=3)
    count = len(MODEL.model.model_sampling.sigmas)
    assert 0.5 * count <= min(seen) < 0.55 * count and 0.7 * count < max(seen) < 0.75 * count


def test_what_cannot_be_learned_together_is_refused():
    with pytest.raises(ValueError, match="fixed_norm .* behind_encoder .* turn one off"):
        action(behind_encoder=True, fixed_norm=True)
    with pytest.raises(ValueError, match="the range of noise is empty: set lowest_noise .0.5. below highest_noise"):
        action(lowest_noise=0.5, highest_noise=0.5)


def test_the_base_is_the_fingerprint_that_apply_compares():
    actual, _ = train(steps=1)
    assert actual.base == sampling.apply(MODEL, 1.0).get_attachment(sampling.KEY).base
    assert (actual.placeholder, actual.initial_word) == ("<action>", "dancing")
