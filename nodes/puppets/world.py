"""Which takes there are: seeded sampling, the splits, and the identities kept for tests."""

import functools
import re

import numpy as np

from .captions import colour_name
from .config import (ACTIONS, COATS, COLOURS, DETAILS, HEADWEAR, NAMED_ACTIONS, PATTERNS, RGB, SCENES, SPECIES,
                     SPLITS, UNNAMED_ACTIONS, Identity, Take)

# Pairs of species and named action that no training picture shows: two for six of the species, one for the others.
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    pair for i, species in enumerate(SPECIES)
    for pair in ((species, NAMED_ACTIONS[(5 * i + 1) % 12]), (species, NAMED_ACTIONS[(5 * i + 8) % 12]))[:1 + (i % 4 > 0)]
)
TEST_COUNT = 24
_SPLIT_KEY = {split: i for i, split in enumerate(SPLITS)}
_UNNAMED_SHARE, _DETAIL_SHARE, _WHITE_SHARE = 0.25, 0.45, 0.6
_CLEAR = 0.16  # least distance of a pattern or emblem from the cloth below it


def identity_words(identity: Identity) -> tuple[str, ...]:
    """What words can say of an identity, pattern colour apart: the key by which test identities are kept out."""
    hat = "none" if identity.headwear == "none" else colour_name(identity.headwear_colour)
    return (identity.species, colour_name(identity.shirt), identity.pattern, colour_name(identity.trousers),
            identity.headwear, hat)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _colour(rng: np.random.Generator, name: str) -> RGB:
    """A colour that is called `name`."""
    anchor = np.array(COLOURS[name])
    for width in (0.07, 0.07, 0.05, 0.03):
        colour = tuple(np.clip(anchor + rng.uniform(-width, width, 3), 0, 1).round(4).tolist())
        if colour_name(colour) == name:
            return colour
    return COLOURS[name]


def _distance(a: RGB, b: RGB) -> float:
    return float(np.square(np.subtract(a, b)).mean() ** 0.5)


def _contrasting(rng: np.random.Generator, grounds: tuple[RGB, ...], names: tuple[str, ...]) -> RGB:
    clear = [n for n in names if min(_distance(COLOURS[n], ground) for ground in grounds) > _CLEAR]
    return _colour(rng, _pick(rng, clear))


def _identity(rng: np.random.Generator, species: str) -> Identity:
    names = tuple(COLOURS)
    skin, accent = _pick(rng, COATS[species])
    skin, accent = (tuple(np.clip(np.add(c, rng.uniform(-0.03, 0.03, 3)), 0, 1).round(4).tolist())
                    for c in (skin, accent))
    shirt = _colour(rng, _pick(rng, names))
    pattern = _pick(rng, PATTERNS)
    light = pattern != "plain" and rng.random() < _WHITE_SHARE and colour_name(shirt) != "white"
    second = _colour(rng, "white") if light else _contrasting(rng, (shirt,), tuple(n for n in names if n != "white"))
    trousers = _contrasting(rng, (shirt,), names)
    headwear = _pick(rng, HEADWEAR)
    headwear_colour = _contrasting(rng, (skin, accent) if species == "person" else (skin,), names)
    detail = _pick(rng, DETAILS[1:]) if rng.random() < _DETAIL_SHARE else "none"
    grounds = {"odd_trousers": (trousers, shirt), "eye_patch": (skin, (0.16, 0.16, 0.19)), "two_tone": (shirt, second)}
    detail_colour = _contrasting(rng, grounds.get(detail, (shirt, second)), names)
    return Identity(species, skin, accent, shirt, pattern, second, trousers, headwear, headwear_colour, detail,
                    detail_colour)


@functools.cache
def test_identities() -> tuple[Identity, ...]:
    """24 identities, three of every species; training shows none of them, nor any described by the same words.

    Of each species one has no detail and two have one; every pattern and piece of headwear occurs.
    """
    rng = np.random.default_rng(0x7E57)
    found: list[Identity] = []
    for i in range(TEST_COUNT):
        species, pattern, headwear = SPECIES[i % 8], PATTERNS[(i + i // 8) % 4], HEADWEAR[i % 5]
        while True:
            who = _identity(rng, species)
            plain = who.detail == "none"
            if who.pattern == pattern and who.headwear == headwear and plain == (i < 8):
                break
        found.append(who)
    return tuple(found)


@functools.cache
def _kept_out() -> frozenset[tuple[str, ...]]:
    return frozenset(identity_words(who) for who in test_identities())


def sample_identity(seed: int) -> Identity:
    """A random identity that is none of the test identities, nor described by the words of one."""
    rng = np.random.default_rng([0x1DE, seed])
    return _training_identity(rng, _pick(rng, SPECIES))


def _training_identity(rng: np.random.Generator, species: str) -> Identity:
    while True:
        who = _identity(rng, species)
        if identity_words(who) not in _kept_out():
            return who


def sample_take(seed: int, split: str = "train") -> Take:
    """The take of a seed. "train" and "validation" show seen pairs of species and action, "unseen" the held-out ones.

    The same seed gives unrelated takes in different splits. Raises ValueError for an unknown split.
    """
    if split not in _SPLIT_KEY:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([0x7A4E, _SPLIT_KEY[split], seed])
    if split == "unseen":
        species, action = _pick(rng, sorted(HELD_OUT_PAIRS))
    else:
        species = _pick(rng, SPECIES)
        allowed = [a for a in NAMED_ACTIONS if (species, a) not in HELD_OUT_PAIRS]
        action = _pick(rng, UNNAMED_ACTIONS if rng.random() < _UNNAMED_SHARE else allowed)
    return staged(_training_identity(rng, species), action, _pick(rng, SCENES), rng)


def staged(identity: Identity, action: str, scene: str, rng: np.random.Generator) -> Take:
    """A take with a random moment, side, light and camera."""
    return Take(
        identity, action, phase=round(float(rng.random()), 4), mirrored=bool(rng.random() < 0.5), scene=scene,
        light=round(float(rng.uniform(0.88, 1.06)), 4), dx=round(float(rng.uniform(-0.08, 0.08)), 4),
        dy=round(float(rng.uniform(-0.03, 0.02)), 4), scale=round(float(rng.uniform(0.9, 1.06)), 4),
        seed=int(rng.integers(2**31)),
    )


def check_name(kind: str, name: str, allowed: tuple[str, ...]) -> str:
    """`name` if it is one of `allowed`; else ValueError that lists them."""
    if name not in allowed:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(allowed)}")
    return name


_IGNORED = frozenset(("a", "an", "the", "with", "and", "no", "hat", "in", "puppet", "shirt"))


def identity_from_words(words: str) -> Identity:
    """An identity from words: "red striped robot with blue trousers and a yellow cap", "test 3", "random 7".

    Colours are the named ones exactly; what is not said is a plain red shirt, blue trousers and no hat. Raises
    ValueError that lists the allowed words.
    """
    text = words.lower().replace(",", " ")
    if numbered := re.fullmatch(r"\s*(test|random)\s*(\d*)\s*", text):
        number = int(numbered[2] or 0)
        if numbered[1] == "random":
            return sample_identity(number)
        if number >= TEST_COUNT:
            raise ValueError(f"there is no test identity {number}: choose 0 to {TEST_COUNT - 1}")
        return test_identities()[number]
    tokens = text.replace("top hat", "top_hat").split()
    hats = {"cap": "cap", "beanie": "beanie", "crown": "crown", "top_hat": "top hat"}
    known = {*SPECIES, *COLOURS, *PATTERNS, *hats, "trousers", *_IGNORED}
    if unknown := [t for t in tokens if t not in known]:
        raise ValueError(f"the theatre has no word {unknown[0]!r} for an identity: {_identity_help()}")
    species = [t for t in tokens if t in SPECIES]
    if len(species) != 1:
        raise ValueError(f"name exactly one species in {words!r}: {_identity_help()}")
    at = tokens.index(species[0])
    shirt = [t for t in tokens[:at] if t in COLOURS] or ["red"]
    patterns = [t for t in tokens[:at] if t in PATTERNS] or ["plain"]
    worn, waiting = {}, None
    for token in tokens[at + 1:]:
        if token in COLOURS:
            waiting = token
        elif token == "trousers" or token in hats:
            worn[token] = waiting
            waiting = None
    hat = next((t for t in worn if t in hats), None)
    skin, accent = COATS[species[0]][0]
    second = shirt[1] if len(shirt) > 1 else "yellow" if shirt[0] == "white" else "white"
    return Identity(species[0], skin, accent, COLOURS[shirt[0]], patterns[0], COLOURS[second],
                    COLOURS[worn.get("trousers") or "blue"], hats[hat] if hat else "none",
                    COLOURS[(worn.get(hat) if hat else None) or "yellow"])


def _identity_help() -> str:
    return (f"write for example 'red striped robot with blue trousers and a yellow cap', 'test 3' or 'random'; "
            f"species {', '.join(SPECIES)}; colours {', '.join(COLOURS)}; patterns {', '.join(PATTERNS)}; "
            f"headwear {', '.join(h for h in HEADWEAR if h != 'none')}, no hat")


__all__ = ["ACTIONS", "HELD_OUT_PAIRS", "check_name", "identity_from_words", "identity_words", "sample_identity",
           "sample_take", "staged", "test_identities"]
