"""The experiment's rivals: unchanged they equal our nodes, each changes what its name says; its cases and data."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiments import video_arms as arms
from experiments import video_identity as experiment
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import DenoisingObjective, Sample
from pack.nodes.training.session import session
from pack.nodes.video_identity import sampling, training
from support import tiny_model
from support.video_identities import ADAPTER, MODEL, draw, person, picture_latent, relative, sample, shown

LATENT = picture_latent()

class Shared(arms.Plain):
    """The reference at the first frame's positions, by the published network."""

    def image_positions(self, rows, columns, image_rows, image_columns):
        return [(0, h, w) for h in range(image_rows) for w in range(image_columns)]


class OnVideo(arms.Plain):
    """The updates in the projections of the video's tokens and not in the image's."""

    def project(self, name, x, turn, image):
        return super().project(name, x, turn, not image)


DEFINITIONS = {arms.VANILLA: arms.Vanilla, arms.SHARED: Shared, arms.ON_VIDEO: OnVideo}


def through(network):
    return sample(arms.through(network, MODEL, ADAPTER, LATENT))


def as_kind(kind):
    with arms.instead(kind):
        return sample(arms.applied(kind, MODEL, ADAPTER, LATENT))


def test_the_plain_network_samples_what_our_nodes_sample():
    ours = sample(shown(MODEL, person(latent=LATENT)))
    assert relative(ours, through(arms.Plain)) < 1e-4 and relative(ours, as_kind(arms.RESTRICTED)) < 1e-6
    assert relative(ours, sample(MODEL)) > 1e-2


@pytest.mark.parametrize(("kind", "network"), DEFINITIONS.items())
def test_a_rival_samples_what_its_definition_says_and_neither_ours_nor_the_plain_model(kind, network):
    actual = as_kind(kind)
    assert relative(actual, through(network)) < 1e-4
    assert relative(actual, as_kind(arms.RESTRICTED)) > 1e-3 and relative(actual, sample(MODEL)) > 1e-3


@pytest.mark.parametrize(("network", "sees"), [(arms.Plain, False), (arms.Vanilla, True)])
def test_only_in_vanilla_attention_the_reference_sees_the_video(network, sees):
    """From the second block on, since the first one's keys are made before any attention."""
    wan, image, keys = network(MODEL, ADAPTER.tensors()), LATENT.clone(), []
    for seed in (3, 4):
        wan(draw(seed, 1, 16, 3, 8, 6), torch.tensor([500.0]), draw(9, 1, 4, tiny_model.CONTEXT), image)
        keys.append([k for k, _ in wan.attended])
    first, *later = [torch.equal(*pair) for pair in zip(*keys, strict=True)]
    assert first and later and all(same is not sees for same in later)


def gradients(variant):
    """Of one step of the pack's objective, by projection."""
    config = TrainingConfig(1, 1e-3, dtype="fp32")
    latent = draw(5, 1, 16, 3, 8, 6)
    with session(sampling.with_block_patches(MODEL), [1, *latent.shape[1:]], config) as denoiser:
        adapter = training._mapped(ADAPTER, lambda tensor: torch.nn.Parameter(tensor.detach().float().clone()))
        conditions = denoiser.prepare([[torch.ones(1, 4, tiny_model.CONTEXT), {}]], latent)
        conditions[training._REFERENCE] = LATENT.clone()
        objective = DenoisingObjective(variant(denoiser, adapter), [Sample(latent, conditions)], config)
        objective(0, torch.Generator().manual_seed(1)).backward()
        return {name: tensor.grad for name, tensor in adapter.tensors().items()}


def apart(first, second):
    """The largest distance of two gradients of one name, of those that are something in both."""
    both = [
        name for name, grad in second.items() if first[name] is not None and grad is not None and grad.any()
    ]
    return max(relative(first[name], second[name]) for name in both)


def published(network):
    return gradients(functools.partial(arms._Joint, network))


def test_the_plain_network_has_our_gradients():
    assert apart(gradients(training.WithReferences), published(arms.Plain)) < 1e-3


@pytest.mark.parametrize(("kind", "network"), DEFINITIONS.items())
def test_a_rival_s_training_follows_its_definition_s_gradients(kind, network):
    ours = gradients(training.WithReferences)
    with arms.instead(kind):
        theirs = gradients(training.WithReferences)
    assert apart(theirs, published(network)) < 1e-3 and apart(theirs, ours) > 1e-2
    assert all(grad is not None and grad.any() for name, grad in theirs.items() if ours[name] is not None)


def test_a_case_shows_another_of_the_species_and_no_action_twice():
    for index in range(0, experiment.COUNTS[0], 5):
        one = experiment.case(index)
        own, other = one.truth.identity, one.other.identity
        assert own == one.reference.identity != other and own.species == other.species
        assert dataclasses.replace(one.other, identity=own) == one.reference
        assert one.reference.scene != one.truth.scene and one.reference.light != one.truth.light == "day"
    for puppet in range(3):
        actions = {experiment.case(puppet + 24 * turn).truth.action for turn in range(3)}
        assert len(actions) == 3


def test_another_s_reference_is_another_s_and_a_small_one_is_half_as_large_and_off_the_middle():
    bench = experiment.Bench.__new__(experiment.Bench)
    bench.develop, one = False, experiment.case(1)
    own, another, small = (bench.reference(one, shows, 1) for shows in (
        experiment.OWN, experiment.ANOTHER, experiment.SMALL
    ))
    assert torch.equal(own, arms.reference_image(one.reference))
    assert torch.equal(another, arms.reference_image(one.other)) and not torch.equal(own, another)
    rows, columns = ((small < 1).any(-1)[0].any(axis).nonzero().flatten() for axis in (1, 0))
    for places in (rows, columns):
        assert len(places) <= 48 and (places[-1] < 48 or places[0] >= 48)
    assert small.mean() > own.mean()


@pytest.mark.parametrize("name", [experiment.OURS, experiment.OTHERS, "shipped, as published", arms.SHARED])
def test_an_arm_shows_its_reference_by_its_adapter_strength_and_guidance(monkeypatch, name):
    bench, seen = experiment.Bench.__new__(experiment.Bench), []
    bench.develop, bench.folder = False, None
    encode = SimpleNamespace(encode=lambda image: image)
    bench.theatre = SimpleNamespace(model=MODEL, vae=encode, decode=lambda latents: latents)
    monkeypatch.setattr(bench, "sampled", lambda *_: torch.zeros(1), raising=False)
    monkeypatch.setattr(arms, "learned", lambda *_: ("trained", 0.0))
    monkeypatch.setattr(experiment, "shipped", lambda: "shipped")
    monkeypatch.setattr(arms, "applied", lambda *given: seen.append(given))
    arm, one = experiment.ARMS[name], experiment.case(1)
    bench.clips(arm, [1], [one], [bench.reference(one, arm.shows, 1)])
    (kind, model, adapter, latent, config), = seen
    published = name in ("shipped, as published", arms.SHARED)
    assert (config.strength, config.reference_guidance) == ((1, 0) if published else (2, 2)) and model is MODEL
    assert (kind, adapter) == ((arms.SHARED, "trained") if name == arms.SHARED else (arms.RESTRICTED, "shipped"))
    take = one.other if name == experiment.OTHERS else one.reference
    assert torch.equal(latent, arms.reference_image(take))


def test_training_data_has_a_reference_of_its_clip_s_puppet_and_texts_without_clothes(tmp_path):
    """Encoded by a stand-in, which hands on what it is given."""
    seen = []
    theatre = SimpleNamespace(
        encode=lambda clips: seen.append(clips) or torch.zeros(1, 16, 3, 12, 12),
        vae=SimpleNamespace(encode=lambda image: image[:, :12, :12, :1].movedim(-1, 1).unsqueeze(2)),
    )
    found = arms.data(theatre, tmp_path, 2)
    assert found.latents.shape == (2, 16, 3, 12, 12) and [clip.shape for clip in seen] == [(1, 9, 96, 96, 3)] * 2
    assert 0.2 < found.inside.mean() < 0.9 and found.inside.shape == (2, 1, 3, 12, 12)
    assert not any(word in text.split() for text in found.texts for word in ("hat", "striped", "plain", "with"))
    again = arms.data(theatre, tmp_path, 2)
    assert len(seen) == 2 and torch.equal(again.references, found.references)
    rng = np.random.default_rng(0)
    for i in range(5):
        clip = arms.world.sample_take(arms.FIRST_CLIP + i, "train", "close_up")
        take = arms.reference_take(clip, rng)
        assert take.identity == clip.identity and take.action != clip.action and take.scene != clip.scene


@pytest.mark.parametrize("masked", [False, True])
def test_a_training_sees_each_clip_and_its_first_frame_beside_the_clip_s_reference(tmp_path, monkeypatch, masked):
    found = arms.Data(draw(1, 2, 16, 3, 4, 4), draw(2, 2, 16, 1, 4, 4), torch.rand(2, 1, 3, 4, 4), ("a", "b"))
    monkeypatch.setattr(arms, "data", lambda *_: found)
    monkeypatch.setattr(arms.trainings.extension, "register_folders", lambda: None)  # of the whole process
    theatre, seen = SimpleNamespace(model=MODEL, prompts=lambda texts: texts[0]), []

    def train(_model, latents, references, texts, config, rank, **options):
        seen.append((latents, references, texts, config, options))
        return ADAPTER, {"loss": [1.0]}

    monkeypatch.setattr(arms.training, "train", train)
    for stills in (False, True):
        arms.learned(theatre, tmp_path, arms.Training(steps=2, stills=stills, masked=masked))
    (clips, *_), (latents, references, texts, config, options) = seen
    assert torch.equal(torch.cat(clips), found.latents)
    assert config.learning_rate_at(1) == pytest.approx(0.5 * config.learning_rate)
    assert all(torch.equal(own, clip) for own, clip in zip(latents, clips, strict=False))
    assert all(torch.equal(own, clip[:, :, :1]) for own, clip in zip(latents[2:], clips, strict=True))
    assert [*texts] == ["a", "b", "a", "b"] and torch.equal(references[3], found.references[1:])
    if masked:
        weight = options["weights"][3]
        torch.testing.assert_close(weight, 0.2 + 0.8 * found.inside[1:, :, :1])
    else:
        assert options["weights"] is None
