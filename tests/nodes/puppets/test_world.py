"""Takes, splits and captions of the puppet world, without drawing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.puppets import actions, captions, config, world

SEEDS = st.integers(0, 2**31 - 1)


def said_of(who):
    """What words say of an identity, whatever the second colour of its pattern."""
    cloth = [captions.colour_name(colour) for colour in (who.shirt, who.trousers)]
    hat = captions.colour_name(who.headwear_colour) if who.headwear != "none" else ""
    return (who.species, who.pattern, *cloth, who.headwear, hat)


@pytest.fixture(scope="module", params=config.FRAMINGS)
def framing(request):
    return request.param


@pytest.fixture(scope="module")
def training(framing):
    return [world.sample_take(seed, framing=framing) for seed in range(16_000)]


def test_the_table_says_enough_of_unnamed_actions():
    unnamed = [action for action, facts in config.ACTION_TABLE.items() if not facts.named]
    assert len(unnamed) >= 6
    assert sum("close_up" in config.ACTION_TABLE[action].framings for action in unnamed) >= 3
    assert all(facts.framings and set(facts.framings) <= set(config.FRAMINGS)
               for facts in config.ACTION_TABLE.values())


def test_actions_derive_from_the_table():
    for framing in config.FRAMINGS:
        named, unnamed = config.actions_of(framing, True), config.actions_of(framing, False)
        assert config.actions_of(framing) == named + unnamed and len(named) >= 6
        assert set(named + unnamed) == {a for a, facts in config.ACTION_TABLE.items() if framing in facts.framings}
    assert config.ACTIONS == config.NAMED_ACTIONS + config.UNNAMED_ACTIONS == config.actions_of("full")
    assert set(config.actions_of("full")) == actions.STANCES.keys()
    assert set(config.actions_of("close_up")) == actions.CLOSE_UPS.keys()
    assert {a for a, facts in config.ACTION_TABLE.items() if facts.named} == captions.ACTION_PHRASES.keys()
    with pytest.raises(ValueError, match="full, close_up"):
        config.actions_of("wide")


def test_training_shows_no_held_out_pair_and_no_test_identity(training, framing):
    pairs = Counter((take.identity.species, take.action) for take in training)
    assert not pairs.keys() & world.HELD_OUT[framing]
    kept = {said_of(who) for who in world.test_identities()}
    assert len(kept) == 24
    assert not kept & {said_of(take.identity) for take in training}
    every = {(species, action) for species in config.SPECIES for action in config.actions_of(framing)}
    assert every - pairs.keys() == world.HELD_OUT[framing]
    assert min(pairs.values()) > 30


def test_training_shows_everything_else_often(training, framing):
    details = [d for d in config.DETAILS if framing == "full" or d != "odd_trousers"]
    for attribute, values in (("species", config.SPECIES), ("pattern", config.PATTERNS),
                              ("headwear", config.HEADWEAR), ("detail", details)):
        seen = Counter(getattr(take.identity, attribute) for take in training)
        assert set(seen) == set(values) and min(seen.values()) > 500
    assert set(Counter(take.scene for take in training)) == set(config.SCENES)
    unnamed = sum(not config.ACTION_TABLE[take.action].named for take in training) / len(training)
    assert 0.22 < unnamed < 0.28
    shirts = {take.identity.shirt for take in training}
    assert len(shirts) > 10_000  # colours are continuous


def test_light_and_view_are_independent_of_puppet_action_and_scene(training, framing):
    lights, views = (Counter(getattr(take, name) for take in training) for name in ("light", "view"))
    assert set(lights) == set(config.LIGHTS) and lights["day"] / len(training) == pytest.approx(0.5, abs=0.02)
    assert set(views) == set(config.VIEW_NAMES) and min(views.values()) > 0.22 * len(training)
    for other in ("action", "scene", "mirrored", "light"):
        for name, counts in (("light", lights), ("view", views)):
            if name == other:
                continue
            together = Counter((getattr(take, other), getattr(take, name)) for take in training)
            alone = Counter(getattr(take, other) for take in training)
            for (a, b), count in together.items():
                expected = alone[a] * counts[b] / len(training)
                assert abs(count - expected) < 5 * expected**0.5, (a, b)
    assert {take.framing for take in training} == {framing}


def test_nobody_raises_a_hat_that_is_not_there():
    takes = [world.sample_take(seed, framing="close_up") for seed in range(3_000)]
    assert all(take.identity.headwear != "none" for take in takes if take.action == "raising hat")
    who = world.identity_from_words("red cat")
    take = config.Take(who, "raising hat", framing="close_up", scene="snow")
    assert captions.caption(take) == "close-up of a plain red cat with no hat in the snow"


@pytest.mark.parametrize(("light", "view"), [("moon", None), (None, "left"), ("dusk", "far")])
def test_given_light_and_view_change_nothing_else(framing, light, view):
    who = world.test_identities()[0]
    for seed in range(20):
        free = world.staged(who, "waving", "city", np.random.default_rng(seed), framing)
        chosen = world.staged(who, "waving", "city", np.random.default_rng(seed), framing, light, view)
        assert chosen == dataclasses.replace(free, light=light or free.light, view=view or free.view)


def test_held_out_pairs_leave_every_species_and_action_covered(framing):
    pairs, named = world.HELD_OUT[framing], config.actions_of(framing, True)
    assert 0.12 < len(pairs) / (len(config.SPECIES) * len(named)) < 0.18
    assert max(Counter(species for species, _ in pairs).values()) <= 2
    assert max(Counter(action for _, action in pairs).values()) <= 2
    assert all(action in named for _, action in pairs)
    assert world.HELD_OUT_PAIRS == world.HELD_OUT["full"]


def test_splits(framing):
    unseen = [world.sample_take(seed, "unseen", framing) for seed in range(600)]
    assert {(take.identity.species, take.action) for take in unseen} == world.HELD_OUT[framing]
    validation = [world.sample_take(seed, "validation", framing) for seed in range(600)]
    assert not {(take.identity.species, take.action) for take in validation} & world.HELD_OUT[framing]
    assert not set(validation) & {world.sample_take(seed, "train", framing) for seed in range(600)}
    with pytest.raises(ValueError, match="train, validation, unseen"):
        world.sample_take(0, "test")
    with pytest.raises(ValueError, match="full, close_up"):
        world.sample_take(0, framing="wide")


def test_test_identities_cover_the_world():
    who = world.test_identities()
    assert Counter(i.species for i in who) == {species: 3 for species in config.SPECIES}
    assert {i.pattern for i in who} == set(config.PATTERNS)
    assert {i.headwear for i in who} == set(config.HEADWEAR)
    assert sum(i.detail == "none" for i in who) == 8 and len({i.detail for i in who}) >= 6


@given(SEEDS)
def test_a_seed_gives_one_take(seed):
    assert world.sample_take(seed) == world.sample_take(seed)
    assert world.sample_take(seed) != world.sample_take(seed + 1)


@given(SEEDS, st.sampled_from(config.SPLITS), st.sampled_from(config.FRAMINGS))
def test_takes_are_well_formed(seed, split, framing):
    take = world.sample_take(seed, split, framing)
    who = take.identity
    for colour in (who.skin, who.accent, who.shirt, who.pattern_colour, who.trousers, who.headwear_colour,
                   who.detail_colour):
        assert len(colour) == 3 and all(0 <= c <= 1 for c in colour)
    assert captions.colour_name(who.shirt) != captions.colour_name(who.trousers)
    assert 0 <= take.phase <= 1 and take.light in config.LIGHTS and take.view in config.VIEWS[framing]


def test_captions_use_the_vocabulary_and_nothing_unnamed():
    rng = np.random.default_rng(0)
    allowed = set(captions.VOCABULARY)
    unnamed = {*config.UNNAMED_ACTIONS, *config.DETAILS[1:], *config.LIGHTS, "far"}
    used: set[str] = set()
    for seed in range(5_000):
        take = world.sample_take(seed, framing=config.FRAMINGS[seed % 2])
        for text in (captions.caption(take), captions.training_caption(take, rng)):
            words = text.split()
            used.update(words)
            assert len(words) <= 32
    assert used == allowed
    assert not allowed & unnamed
    assert len(captions.VOCABULARY) == len(set(captions.VOCABULARY)) <= 80


def test_captions_say_what_is_there():
    who = config.Identity("robot", (0.7, 0.7, 0.7), (0.1, 0.1, 0.1), (0.8, 0.2, 0.15), "striped",
                          (0.95, 0.95, 0.9),
                          (0.2, 0.3, 0.8), "cap", (0.95, 0.85, 0.2), "heart")
    take = config.Take(who, "waving", scene="beach")
    said = "a red striped robot with blue trousers and a yellow cap"
    assert captions.caption(take) == f"{said} waving on a beach"
    running = config.Take(who, "running", mirrored=True, scene="night")
    assert captions.caption(running).endswith("a yellow cap running left at night")
    close = config.Take(who, "shaking head", scene="stage", framing="close_up")
    seen = "close-up of a red striped robot with a yellow cap"
    assert captions.caption(close) == f"{seen} shaking the head on a stage"
    assert captions.caption(close, clothes=False) == "close-up of a robot shaking the head on a stage"
    assert captions.caption(take, clothes=False) == "a robot waving on a beach"
    saluting = config.Take(who, "saluting", scene="snow")
    assert captions.caption(saluting) == f"{captions.subject_phrase(who)} in the snow"


def test_training_captions_leave_clauses_out_at_the_stated_rate():
    rng, take = np.random.default_rng(1), world.sample_take(3)
    assert take.action in config.NAMED_ACTIONS
    texts = [captions.training_caption(take, rng) for _ in range(4_000)]
    for phrase in (captions.SCENE_PHRASES[take.scene], captions.ACTION_PHRASES[take.action], "trousers"):
        assert 0.09 < sum(phrase not in text for text in texts) / len(texts) < 0.15
    assert 0.02 < sum("puppet" in text.split() for text in texts) / len(texts) < 0.06


def test_training_captions_leave_all_clothes_out_at_the_stated_rate():
    rng, take = np.random.default_rng(2), world.sample_take(5, framing="close_up")
    assert captions.caption(take) == "close-up of a brown striped rabbit with a yellow cap nodding in a forest"
    texts = [captions.training_caption(take, rng, bare=0.4) for _ in range(4_000)]
    bare = [text for text in texts if not {"brown", "striped", "with", "cap"} & set(text.split())]
    assert 0.38 < len(bare) / len(texts) < 0.45
    assert captions.caption(take, clothes=False) in bare
    assert 0.09 < sum("close-up" not in text for text in texts) / len(texts) < 0.15


@given(st.integers(0, 23) | st.none(), SEEDS)
def test_words_and_identities_agree(number, seed):
    who = world.sample_identity(seed) if number is None else world.test_identities()[number]
    said = captions.subject_phrase(who)
    assert captions.subject_phrase(world.identity_from_words(said)) == said


def test_numbered_identities():
    assert world.identity_from_words(" Test 3 ") == world.test_identities()[3]
    assert world.identity_from_words("random 7") == world.sample_identity(7) != world.sample_identity(8)


@pytest.mark.parametrize("name", config.COLOURS)
def test_named_colours_are_called_by_their_name(name):
    assert captions.colour_name(config.COLOURS[name]) == name
