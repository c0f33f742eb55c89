"""The figures of learnt actions are counted as PROTOCOL.md says: who, how often, with which noise, paired by case."""

import types

import numpy as np
import pytest
from experiments import action_bench, action_identifier, action_identifier_wan, report, theatre_wan
from experiments.action_bench import MEASURES, cases, exemplars, rows_of, text
from experiments.theatre import worded
from pack.nodes.puppets import world
from pack.nodes.puppets.config import ACTIONS, UNNAMED_ACTIONS

ACTION = "saluting"


def test_exemplars_share_the_action_alone_and_none_is_a_test_puppet():
    for action in UNNAMED_ACTIONS:
        takes = exemplars(action)
        assert {take.action for take in takes} == {action} and len(takes) == 5
        assert len({take.identity.species for take in takes}) == len({take.scene for take in takes}) == 5
        assert not {take.identity for take in takes} & set(world.test_identities())


def test_twelve_test_puppets_do_it_as_words_can_say_them():
    takes = cases(ACTION)
    assert [take.identity for take in takes] == [worded(who) for who in world.test_identities()[:12]]
    assert {take.action for take in takes} == {ACTION} and takes == cases(ACTION)
    assert len({take.identity.species for take in takes}) == len({who.species for who in world.test_identities()})
    develop = cases(ACTION, develop=True)
    assert not {take.identity for take in develop} & {worded(who) for who in world.test_identities()}
    assert set(action_bench.TEST_ACTIONS) | set(action_bench.DEVELOPMENT_ACTIONS) == set(UNNAMED_ACTIONS)
    assert action_identifier.FEW_ACTIONS == ("saluting", "balancing") and len(action_bench.TEST_ACTIONS) == 6


def test_a_word_stands_where_a_named_action_would():
    take = cases(ACTION)[0]
    assert text(take, "<action>").count(" <action> ") == 1
    assert text(take, "").split() == text(take, "<action>").replace("<action>", "").split()


def test_each_case_has_its_seeds_in_turn():
    pictures = action_bench.drawn(cases(ACTION)).repeat(2, 0)
    pictures[2] = 255  # the first seed of the second case
    rows = rows_of("an arm", ACTION, pictures)
    assert [(row["case"], row["seed"]) for row in rows] == [(case, seed) for case in range(12) for seed in (0, 1)]
    assert not rows[2]["action"] and rows[3]["action"] and rows[2]["identity_error"] > rows[3]["identity_error"]
    found = action_bench.by_case(rows)
    assert list(found) == [(ACTION, case) for case in range(12)]
    assert found[ACTION, 1]["action"] == 0.5 and found[ACTION, 2]["action"] == 1
    assert found[ACTION, 1]["identity_error"] == pytest.approx(np.mean([row["identity_error"] for row in rows[2:4]]))


def row(arm, action, case, seed, value):
    return {"arm": arm, "action_asked": action, "case": case, "seed": seed, **dict.fromkeys(MEASURES, value)}


def test_ours_is_compared_over_the_cases_and_seeds_that_the_other_has():
    ours = action_identifier.OURS
    rows = [row(ours, action, case, seed, 1.0 if seed < 2 else 100.0)
            for action in ("a", "b") for case in range(3) for seed in range(4)]
    rows += [row("other", "a", case, seed, 0.25 * case + seed) for case in range(3) for seed in range(2)]
    found = action_identifier.less(rows, "other")
    # Of action a alone, by case: 1 less the mean of 0 and 1, and a quarter more for each case.
    assert found["cases"] == 3 and found["composition"][0] == pytest.approx(np.mean([0.5, 0.25, 0.0]))
    assert action_identifier.means(rows[:12])["action"][0] == pytest.approx((1 + 1 + 100 + 100) / 4)


class Theatre:
    """Notes what is sampled; a prompt is the take that it is of."""

    scheduler = "normal"

    def __init__(self, shape):
        self.shape, self.asked = shape, []

    def sampler(self, name):
        return name

    def sample(self, sampler, positive, seeds, **settings):
        self.asked.append((positive, seeds, sampler, settings["steps"]))
        return np.zeros((len(seeds), *self.shape), np.uint8)

    def decode(self, made):
        return made


def stage_of(kind, tmp_path, shape):
    stage = kind.__new__(kind)
    stage.theatre, stage.kept = Theatre(shape), report.Pictures(tmp_path)
    stage.reading = types.MethodType(lambda _self, _learning, _action: ("model", lambda take: take), stage)
    return stage


@pytest.mark.parametrize("seeds", [4, 2])
def test_pictures_have_the_noise_of_their_action_case_and_seed_in_every_arm(seeds, tmp_path):
    stage = stage_of(action_identifier.Stage, tmp_path, (1, 1, 3))
    stage.pictures(action_identifier.Arm(None, seeds=seeds), ACTION)
    first = 5_000_000 + 100 * ACTIONS.index(ACTION)
    assert stage.theatre.asked == [
        (take, [first + 4 * case + seed for seed in range(seeds)], "dpmpp_2m", 10)
        for case, take in enumerate(cases(ACTION))
    ]


def test_clips_have_the_noise_of_their_action_and_case(tmp_path):
    stage = stage_of(action_identifier_wan.VideoStage, tmp_path, (1, 1, 1, 3))
    stage.clips(None, ACTION)
    first = 6_000_000 + 100 * ACTIONS.index(ACTION)
    assert stage.theatre.asked == [
        (take, [first + case], theatre_wan.SAMPLER, theatre_wan.STEPS) for case, take in enumerate(cases(ACTION))
    ]


def test_the_video_model_learns_as_the_picture_model_but_for_min_snr():
    arms = action_identifier_wan.ARMS
    chosen = action_identifier.SETTINGS["rate 0.004, Min-SNR 1"]
    for name, triples in ((action_identifier.OURS, True), ("layer-wise tokens (P+)", False)):
        assert (arms[name].learning_rate, arms[name].steps) == (chosen.learning_rate, chosen.steps) == (0.004, 200)
        assert arms[name].triples is triples and arms[name].layer_wise and arms[name].min_snr_gamma == 0
    assert arms[action_identifier.PROMPT] is None
