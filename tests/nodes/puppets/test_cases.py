"""Cases of the experiments: development apart from test, seeds that say everything, truths that nothing copies."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from experiments import cases, identity_prior, sampling, theatre
from pack.nodes.puppets import captions, world
from pack.nodes.puppets.config import ACTION_TABLE, SPECIES, UNNAMED_ACTIONS


def test_development_has_none_of_the_test_identities_words():
    words = {world.identity_words(who) for who in world.test_identities()}
    found = cases.people(development=True)
    assert not words & {world.identity_words(who) for who in found}
    assert [who.species for who in found] == [*SPECIES, *SPECIES, *SPECIES] and len(set(found)) == 24
    assert all((who.detail == "none") == (i < 8) for i, who in enumerate(found))


@pytest.mark.parametrize("development", [False, True])
def test_a_case_is_a_function_of_its_seeds(development):
    first = cases.transfer(5, development), cases.subject(5, development), cases.performers("starfish", development)
    cases.people.cache_clear()
    assert first == (
        cases.transfer(5, development), cases.subject(5, development), cases.performers("starfish", development)
    )
    assert cases.transfer(5, development) != cases.transfer(6, development)
    assert cases.transfer(5, development) != cases.transfer(5, not development)
    draws = {int(cases.generator(m, i, d).integers(2**62)) for m in (1, 2) for i in (0, 1) for d in (False, True)}
    assert len(draws) == 8


def test_no_two_cases_share_noise():
    methods = range(1, 7)
    seeds = [cases.noise_seed(m, i, d) for m in methods for d in (False, True) for i in range(6000)]
    assert len(set(seeds)) == len(seeds)
    assert cases.noise_seed(4, 7) == 40_000_007


@pytest.mark.parametrize("case", range(0, 120, 7))
def test_a_driver_shares_nothing_but_the_action_with_the_truth(case):
    found = cases.transfer(case)
    source, driver, truth, wrong = found.source, found.driver, found.truth, found.wrong
    assert driver.scene != truth.scene and driver.light != truth.light
    assert driver.identity.species != truth.identity.species and not ACTION_TABLE[truth.action].named
    assert driver.action == truth.action != wrong.action and wrong.action in UNNAMED_ACTIONS
    assert (driver.view == "centre") == (case % 2 == 0)
    assert (source.identity, source.scene, source.light, source.seed) == (
        truth.identity, truth.scene, truth.light, truth.seed)
    pictures = cases.pictures([source, driver, truth, wrong]).astype(float)
    assert min(np.abs(pictures[2] - other).mean() for other in pictures[[0, 1, 3]]) > 2
    assert all(word not in captions.caption(truth) for word in (truth.action, "standing"))


@pytest.mark.parametrize("index", range(16))
def test_no_edit_asks_for_what_was_learned(index):
    found = cases.subject(index)
    learned = {take.action for take in found.learned}
    assert len(learned) == 4 and found.identity.detail != "none"
    assert [edit.mirrored for edit in found.edits] == [False, False, False, True]
    assert not learned & {edit.truth.action for edit in found.edits[:3]}
    assert all(ACTION_TABLE[take.action].named for take in found.learned)
    assert {take.identity for take in found.learned} == {edit.truth.identity for edit in found.edits}
    for edit in found.edits:
        assert edit.source.scene == edit.truth.scene and edit.source.light == edit.truth.light
        source, truth = cases.pictures([edit.source, edit.truth]).astype(float)
        assert np.abs(source - truth).mean() > 1


def test_a_mirrored_view_is_made_beside_the_edits_that_other_arms_make_it_beside():
    made = []

    def edited(_arm, subject, chosen, edits):
        made.append((subject, chosen, [edit.mirrored for edit in edits]))
        return [{"case": case} for case in chosen], np.zeros((len(chosen), 1, 1, 3), np.uint8)

    bench = object.__new__(identity_prior.Bench)
    bench.development, bench.edited = False, edited
    rows, pictures = bench.make(identity_prior.ARMS["mirrored, fresh noise 1"], [4, 5, 6, 7])
    assert made == [(1, [4, 5, 6, 7], [False, False, False, True])]
    assert rows == [{"case": 7}] and list(pictures) == ["7"]
    assert len(bench.make(identity_prior.ARMS[identity_prior.OURS], [4, 5, 6, 7])[0]) == 4


@pytest.mark.parametrize("action", UNNAMED_ACTIONS)
def test_exemplars_share_what_no_performer_has(action):
    shown, asked = cases.exemplars(action), cases.performers(action)
    assert len(shown) == 5 and {(t.identity.species, t.identity.pattern, t.scene) for t in shown} == {
        ("bear", "striped", cases.exemplar_scene(action))}
    assert {captions.colour_name(take.identity.shirt) for take in shown} == {"red"}
    assert len({take.identity for take in shown}) == 5 and len(asked) == 12
    for take in asked:
        assert take.identity.species != "bear" and captions.colour_name(take.identity.shirt) != "red"
        assert take.scene != cases.exemplar_scene(action) and take.identity == cases.worded(take.identity)
        assert take.light == "day", "no word asks for another light"
    assert {take.identity.species for take in asked} == {*SPECIES} - {"bear"}
    development = {take.identity for take in cases.performers(action, True)}
    assert len(development) == 6 and not development & {cases.worded(who) for who in world.test_identities()}


def test_development_actions_are_no_test_actions():
    assert {*cases.TEST_ACTIONS, *cases.DEVELOPMENT_ACTIONS} == {*UNNAMED_ACTIONS} and len(cases.TEST_ACTIONS) == 6


def test_what_else_the_words_could_mean_has_the_same_words_and_other_colours_and_lights(monkeypatch):
    monkeypatch.setattr(theatre, "TRAINING_TAKES", 1_500)
    theatre.colours.cache_clear()
    takes = theatre.cases("seen", 24)
    found = theatre.as_said(takes)
    theatre.colours.cache_clear()
    assert [captions.caption(take) for take in found] == [captions.caption(take) for take in takes]
    assert sum(one.identity.shirt != two.identity.shirt for one, two in zip(found, takes, strict=True)) > 20
    assert 4 < sum(one.light != two.light for one, two in zip(found, takes, strict=True)) < 24
    for one, two in zip(found, takes, strict=True):
        worn = {garment: getattr(two.identity, garment) for garment in theatre.GARMENTS}
        same = dataclasses.replace(one.identity, **worn)
        assert dataclasses.replace(one, identity=same, light=two.light) == two, "nothing else differs"


@pytest.mark.parametrize(("training", "count"), [
    ({"pictures": 5}, 5), ({"autoencoder": {"pictures": 7, "steps": 3}, "unet": {"steps": 1}}, 7), ({}, 0),
])
def test_the_training_pictures_of_a_checkpoint_are_found_in_its_metadata(tmp_path, training, count):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"config": json.dumps({"training": training})})
    assert sampling.training_pictures(path) == count
