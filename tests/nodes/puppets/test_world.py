"""Takes, splits and captions of the puppet world, without drawing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.puppets import captions, config, world

SEEDS = st.integers(0, 2**31 - 1)


def said_of(who):
    """What words say of an identity, whatever the second colour of its pattern."""
    cloth = [captions.colour_name(colour) for colour in (who.shirt, who.trousers)]
    hat = captions.colour_name(who.headwear_colour) if who.headwear != "none" else ""
    return (who.species, who.pattern, *cloth, who.headwear, hat)


@pytest.fixture(scope="module")
def training():
    return [world.sample_take(seed) for seed in range(20_000)]


def test_training_shows_no_held_out_pair_and_no_test_identity(training):
    pairs = Counter((take.identity.species, take.action) for take in training)
    assert not pairs.keys() & world.HELD_OUT_PAIRS
    kept = {said_of(who) for who in world.test_identities()}
    assert len(kept) == 24
    assert not kept & {said_of(take.identity) for take in training}
    every = {(species, action) for species in config.SPECIES for action in config.ACTIONS}
    assert every - pairs.keys() == world.HELD_OUT_PAIRS
    assert min(pairs.values()) > 40


def test_training_shows_everything_else_often(training):
    for attribute, values in (("species", config.SPECIES), ("pattern", config.PATTERNS),
                              ("headwear", config.HEADWEAR), ("detail", config.DETAILS)):
        seen = Counter(getattr(take.identity, attribute) for take in training)
        assert set(seen) == set(values) and min(seen.values()) > 600
    assert set(Counter(take.scene for take in training)) == set(config.SCENES)
    unnamed = sum(take.action in config.UNNAMED_ACTIONS for take in training) / len(training)
    assert 0.22 < unnamed < 0.28
    shirts = {take.identity.shirt for take in training}
    assert len(shirts) > 10_000  # colours are continuous


def test_held_out_pairs_leave_every_species_and_action_covered():
    share = len(world.HELD_OUT_PAIRS) / (len(config.SPECIES) * len(config.NAMED_ACTIONS))
    assert 0.12 < share < 0.18
    assert max(Counter(species for species, _ in world.HELD_OUT_PAIRS).values()) <= 2
    assert max(Counter(action for _, action in world.HELD_OUT_PAIRS).values()) <= 2
    assert all(action in config.NAMED_ACTIONS for _, action in world.HELD_OUT_PAIRS)


def test_splits():
    unseen = [world.sample_take(seed, "unseen") for seed in range(600)]
    assert {(take.identity.species, take.action) for take in unseen} == world.HELD_OUT_PAIRS
    validation = [world.sample_take(seed, "validation") for seed in range(600)]
    assert not {(take.identity.species, take.action) for take in validation} & world.HELD_OUT_PAIRS
    assert not set(validation) & {world.sample_take(seed) for seed in range(600)}
    with pytest.raises(ValueError, match="train, validation, unseen"):
        world.sample_take(0, "test")


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


@given(SEEDS, st.sampled_from(config.SPLITS))
def test_takes_are_well_formed(seed, split):
    take = world.sample_take(seed, split)
    who = take.identity
    for colour in (who.skin, who.accent, who.shirt, who.pattern_colour, who.trousers, who.headwear_colour,
                   who.detail_colour):
        assert len(colour) == 3 and all(0 <= c <= 1 for c in colour)
    assert captions.colour_name(who.shirt) != captions.colour_name(who.trousers)
    assert 0 <= take.phase <= 1 and 0.85 <= take.light <= 1.1


def test_captions_use_the_vocabulary_and_nothing_unnamed():
    rng = np.random.default_rng(0)
    allowed = set(captions.VOCABULARY)
    unnamed = {*config.UNNAMED_ACTIONS, *config.DETAILS[1:]}
    used: set[str] = set()
    for seed in range(5_000):
        take = world.sample_take(seed)
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
    saluting = config.Take(who, "saluting", scene="snow")
    assert captions.caption(saluting) == f"{captions.subject_phrase(who)} in the snow"


def test_training_captions_leave_clauses_out_at_the_stated_rate():
    rng, take = np.random.default_rng(1), world.sample_take(3)
    assert take.action in config.NAMED_ACTIONS
    texts = [captions.training_caption(take, rng) for _ in range(4_000)]
    for phrase in (captions.SCENE_PHRASES[take.scene], captions.ACTION_PHRASES[take.action], "trousers"):
        assert 0.09 < sum(phrase not in text for text in texts) / len(texts) < 0.15
    assert 0.02 < sum("puppet" in text.split() for text in texts) / len(texts) < 0.06


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
