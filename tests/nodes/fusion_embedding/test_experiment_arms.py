"""The experiment's arms: what each lets through of the source after training, and what its cases and pairs show."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from experiments import fusion_arms as arms
from experiments import fusion_embedding as experiment
from experiments.fusion_arms import CLASS, EMBEDDING, TOKENS
from pack.nodes.fusion_embedding import layout, sampling
from pack.nodes.fusion_embedding.method import WHOLE, Fusion
from support import fusions, tiny_model
from support.fusion_trainings import VAE, VISION

MODEL = tiny_model.as_loaded(fusions.model())  # its own, since a UNet is patched in
THEATRE = SimpleNamespace(model=MODEL, vae=VAE)
COMBINER = arms.Combiner(pairs=3, steps=2, batch=2)


def begun() -> Fusion:
    """What all arms begin with: another UNet than the model's, and a pose path that acts."""
    sizes = sampling.model_sizes(MODEL, fusions.HIDDEN, None)
    generator = layout.new_generator(sizes, 9, arms.POSE_CHANNELS, torch.Generator().manual_seed(3))
    generator["pose.conv_out.weight"] += 0.3
    unet = {f"diffusion_model.{key}": 1.1 * value for key, value in MODEL.model.diffusion_model.state_dict().items()}
    return Fusion(generator=generator, unet=unet, unet_kind=WHOLE)


START = begun()


@pytest.fixture(scope="module")
def shown():
    """Two sources and a pose."""
    return (*fusions.pictures(2, seed=5).split(1), fusions.poses(1))


@pytest.fixture
def small(folder, monkeypatch):
    monkeypatch.setattr(arms, "HIDDEN", 8)
    monkeypatch.setattr(arms, "SIZE", 64)
    monkeypatch.setattr(arms, "AT_ONCE", 2)  # pairs in two parts
    monkeypatch.setattr(arms.vision, "shipped", lambda: VISION)
    monkeypatch.setattr(arms, "start", lambda: START)
    return folder


def conditions(setting, fusion, sources, pose):
    """Tokens and class embedding that the UNet reads."""
    states, fused = arms.read(setting, fusion, VISION, sources, pose)
    (tokens, options), = sampling.conditionings(MODEL, fusion.generator, states, fused, pose)[0]
    return tokens, options["model_conds"][sampling.EMBEDDING].cond


@pytest.mark.parametrize("paths", [arms.PATHS, (TOKENS,), (EMBEDDING,), (CLASS,), ()], ids=str)
def test_an_arm_reads_the_source_by_its_own_paths_alone(small, shown, paths):
    setting = arms.Training(paths, steps=2, batch=2, combiner=COMBINER)
    with torch.inference_mode():
        fusion, cost = arms.learned(THEATRE, small, setting)
    assert cost > 0 and arms.learned(THEATRE, small, setting)[1] == cost  # from its file
    own, other, pose = shown
    with torch.no_grad():
        tokens, embedding = conditions(setting, fusion, {TOKENS: own, EMBEDDING: own}, pose)
        by_tokens = conditions(setting, fusion, {TOKENS: other, EMBEDDING: own}, pose)
        by_e_f = conditions(setting, fusion, {TOKENS: own, EMBEDDING: other}, pose)
    of_source = 5 if TOKENS in paths else 1
    assert tokens.shape[1] == of_source + arms.EMBEDDING_TOKENS * (EMBEDDING in paths)
    assert bool(embedding.any()) is (CLASS in paths)
    changed = (tokens[:, :of_source] != by_tokens[0][:, :of_source]).any()
    assert bool(changed) is (TOKENS in paths)
    assert torch.equal(tokens[:, of_source:], by_tokens[0][:, of_source:]) and torch.equal(embedding, by_tokens[1])
    assert torch.equal(tokens[:, :of_source], by_e_f[0][:, :of_source])
    assert bool((tokens[:, of_source:] != by_e_f[0][:, of_source:]).any()) is (EMBEDDING in paths)
    assert bool((embedding != by_e_f[1]).any()) is (CLASS in paths)


def test_all_arms_begin_with_one_unet_and_one_pose_path(small):
    for paths in ((TOKENS,), ()):
        setting = arms.Training(paths, rate=1e-6, steps=1, batch=2, combiner=COMBINER)  # as good as untrained
        with torch.inference_mode():
            fusion, _ = arms.learned(THEATRE, small, setting)
        for name, weight in fusion.generator.items():
            if name.startswith("pose."):
                torch.testing.assert_close(weight, START.generator[name], atol=1e-6, rtol=1e-5)
        assert fusion.unet.keys() == START.unet.keys()
        for name, weight in fusion.unet.items():
            torch.testing.assert_close(weight, START.unet[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [arms.Further, functools.partial(arms.InOneScene, pairs=2)])
def test_a_training_goes_on_from_what_another_has_left(small, kind):
    first = arms.Training((TOKENS,), steps=2, batch=2, combiner=COMBINER)
    with torch.inference_mode():
        before, _ = arms.learned(THEATRE, small, first)
        after, _ = arms.learned(
            THEATRE, small, kind((TOKENS,), rate=1e-6, steps=1, batch=2, combiner=COMBINER, after=first)
        )
    for found, expected in ((after.generator, before.generator), (after.unet, before.unet)):
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


def test_pairs_and_cases_show_the_source_elsewhere():
    everyone = [arms.takes(i) for i in range(60)]
    everyone += [(one.source, one.truth) for one in map(experiment.case, range(0, experiment.COUNTS[0], 7))]
    for source, target in everyone:
        assert source.identity == target.identity and source.action != target.action
        assert source.scene != target.scene and target.framing == "full"
        assert source.light != "day" == target.light
    framings = [source.framing for source, _ in everyone[:60]]
    assert 5 < framings.count("close_up") < 30
    assert not {source.identity for source, _ in everyone[:60]} & {*experiment.cases.people()}


def test_pairs_in_one_scene_differ_in_what_the_puppet_does_alone(small):
    for source, target in map(arms.takes_in_one_scene, range(40)):
        same = dataclasses.replace(source, action=target.action, phase=target.phase, mirrored=target.mirrored)
        assert same == target and source.action != target.action and target.framing == "full"
        assert target.identity not in experiment.cases.people()
    shared, elsewhere = (
        arms.pairs_of(small, setting(combiner=COMBINER))[0].pictures(0, 1)[0]
        for setting in (functools.partial(arms.InOneScene, pairs=2), arms.Training)
    )
    of_one, of_two = ((pictures[0] - pictures[2]).abs()[:8].mean() for pictures in (shared, elsewhere))
    assert of_one < 0.3 * of_two  # at the upper edge, where scenes differ


def test_the_truths_of_a_puppet_are_six_poses_in_one_scene_and_the_odd_sources_are_small_or_cut():
    found = [experiment.case(3 + 24 * turn) for turn in range(6)]
    assert len({one.truth.action for one in found}) == 6
    assert len({(one.truth.scene, one.truth.light, one.truth.view, one.truth.identity) for one in found}) == 1
    for index in range(0, 48):
        one = experiment.case(index)
        odd = one.source.framing == "close_up" or one.source.view == "far"
        assert odd is bool(index % 2)
        assert dataclasses.replace(one.other, identity=one.source.identity) == one.source != one.other
        assert one.other.identity == experiment.cases.people()[(one.puppet + 1) % 24]


def test_figures_of_the_truth_and_of_the_other_puppet():
    one = experiment.case(0)
    beside = dataclasses.replace(one.truth, identity=one.other.identity)
    pictures = experiment.cases.pictures([one.truth, beside])
    true, wrong = experiment.rows_of([one, one], pictures)
    assert true["identity_error"] < 5 and not true["nearer_other"] and true["joint_error"] < 4
    assert wrong["nearer_other"] and wrong["identity_error"] > true["identity_error"] + 10
