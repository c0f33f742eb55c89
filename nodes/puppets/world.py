"""Which takes there are: seeded sampling, the splits, and the identities kept for tests."""

import functools
import math
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from ..inputs.words import SEPARATORS
from .captions import colour_name
from .config import (
    COATS,
    COLOURS,
    DETAILS,
    FRAMINGS,
    HEADWEAR,
    LIGHTS,
    PATTERNS,
    RGB,
    SCENES,
    SPECIES,
    SPLITS,
    VIEW_NAMES,
    Identity,
    Take,
    actions_of,
)

# Pairs of species and named action that no training picture of a framing shows: 14 of 96, 8 of 56.
HELD_OUT: dict[str, frozenset[tuple[str, str]]] = {
    "full": frozenset((
        ("person", "bowing"), ("person", "cheering"), ("cat", "waving"), ("cat", "running"), ("robot", "crawling"),
        ("robot", "kicking"), ("bear", "sitting"), ("bear", "jumping"), ("rabbit", "pointing"),
        ("frog", "cheering"), ("frog", "handstand"), ("fox", "dancing"), ("fox", "pointing"), ("penguin", "kicking"),
    )),
    "close_up": frozenset((
        ("person", "nodding"), ("cat", "waving"), ("robot", "shaking head"), ("bear", "cheering"),
        ("rabbit", "raising hat"), ("frog", "pointing"), ("fox", "turning"), ("penguin", "cheering"),
    )),
}
HELD_OUT_PAIRS = HELD_OUT["full"]
T = TypeVar("T")
TEST_COUNT = 24
CLOSE_UP_EVERY = 7  # of the stills that a model learns from, one is a close-up, told by a word of its own
_SPLIT_KEY = {split: i for i, split in enumerate(SPLITS)}
_UNNAMED_SHARE, _DETAIL_SHARE, _WHITE_SHARE, _DAY_SHARE = 0.25, 0.45, 0.6, 0.5
_CLEAR, _BOLD = 0.22, 0.27  # least distance of a hat or patch from the coat, of a pattern or emblem from the cloth


def identity_words(identity: Identity) -> tuple[str, ...]:
    """What words say of an identity, pattern colour apart: the key by which test identities are kept out."""
    hat = "none" if identity.headwear == "none" else colour_name(identity.headwear_colour)
    return (identity.species, colour_name(identity.shirt), identity.pattern, colour_name(identity.trousers),
            identity.headwear, hat)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
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
    return math.dist(a, b) / 3**0.5


def _contrasting(rng: np.random.Generator, grounds: tuple[RGB, ...], names: tuple[str, ...],
                 least: float = _BOLD) -> RGB:
    """A colour of one of `names` that is `least` away from all grounds."""
    away = {n: min(_distance(COLOURS[n], ground) for ground in grounds) for n in names}
    clear = [n for n in names if away[n] > least] or [max(names, key=away.get)]
    return _colour(rng, pick(rng, clear))


def _identity(rng: np.random.Generator, species: str) -> Identity:
    names = tuple(COLOURS)
    coloured = tuple(n for n in names if n != "white")
    skin, accent = pick(rng, COATS[species])
    skin, accent = (tuple(np.clip(np.add(c, rng.uniform(-0.03, 0.03, 3)), 0, 1).round(4).tolist())
                    for c in (skin, accent))
    shirt = _colour(rng, pick(rng, names))
    pattern = pick(rng, PATTERNS)
    light = pattern != "plain" and rng.random() < _WHITE_SHARE and colour_name(shirt) != "white"
    second = _colour(rng, "white") if light else _contrasting(rng, (shirt,), coloured)
    trousers = _contrasting(rng, (shirt,), names)
    headwear = pick(rng, HEADWEAR)
    headwear_colour = _contrasting(rng, (skin, accent) if species == "person" else (skin,), names, _CLEAR)
    detail = pick(rng, DETAILS[1:]) if rng.random() < _DETAIL_SHARE else "none"
    below = {"odd_trousers": (trousers, shirt), "eye_patch": (skin, COLOURS["black"], COLOURS["white"])}
    detail_colour = _contrasting(rng, below.get(detail, (shirt, second)), names,
                                 _CLEAR if detail == "eye_patch" else _BOLD)
    return Identity(species, skin, accent, shirt, pattern, second, trousers, headwear, headwear_colour,
                    detail, detail_colour)


@functools.cache
def test_identities() -> tuple[Identity, ...]:
    """24 identities, three of every species; training shows none of them, nor any of the same words.

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
    return _training_identity(rng, pick(rng, SPECIES))


def _training_identity(rng: np.random.Generator, species: str) -> Identity:
    while True:
        who = _identity(rng, species)
        if identity_words(who) not in _kept_out():
            return who


def sample_take(seed: int, split: str = "train", framing: str = "full") -> Take:
    """The take of a seed.

    "train" and "validation" show seen pairs of species and action, "unseen" the held-out ones of the framing. The
    same seed gives unrelated takes in different splits and framings. Nobody without a hat raises one, and no
    close-up is of a puppet whose detail it does not show. Raises ValueError for an unknown split or framing.
    """
    if split not in _SPLIT_KEY:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    named, unnamed = actions_of(framing, True), actions_of(framing, False)
    rng = np.random.default_rng([0x7A4E, _SPLIT_KEY[split], FRAMINGS.index(framing), seed])
    if split == "unseen":
        species, action = pick(rng, sorted(HELD_OUT[framing]))
    else:
        species = pick(rng, SPECIES)
        allowed = [a for a in named if (species, a) not in HELD_OUT[framing]]
        action = pick(rng, unnamed if rng.random() < _UNNAMED_SHARE else allowed)
    while True:
        who = _training_identity(rng, species)
        if not ((action == "raising hat" and who.headwear == "none")
                or (framing == "close_up" and who.detail == "odd_trousers")):
            return staged(who, action, pick(rng, SCENES), rng, framing)


def still_take(index: int, split: str = "train") -> Take:
    """The take of still picture `index` that the theatre's models learn from, one in seven a close-up.

    Close-ups are few: most figures to reach are of full puppets. Autoencoder and image encoder need them.
    """
    return sample_take(index, split, "close_up" if index % CLOSE_UP_EVERY == CLOSE_UP_EVERY - 1 else "full")


def staged(identity: Identity, action: str, scene: str, rng: np.random.Generator, framing: str = "full",
           light: str | None = None, view: str | None = None) -> Take:
    """A take with a random moment, side and camera; also a random light and view where they are None.

    What is given does not change what else is drawn from `rng`. Raises ValueError for an action that the framing
    does not have.
    """
    phase, mirrored = round(float(rng.random()), 4), bool(rng.random() < 0.5)
    dx, dy = round(float(rng.uniform(-0.04, 0.04)), 4), round(float(rng.uniform(-0.02, 0.02)), 4)
    scale, seed = round(float(rng.uniform(0.96, 1.04)), 4), int(rng.integers(2**31))
    usual, drawn_light, drawn_view = rng.random() < _DAY_SHARE, pick(rng, tuple(LIGHTS)[1:]), pick(rng, VIEW_NAMES)
    return Take(identity, action, phase, mirrored, scene, light or ("day" if usual else drawn_light),
                view or drawn_view, dx, dy, scale, seed, framing)


def check_name(kind: str, name: str, allowed: tuple[str, ...]) -> str:
    """`name` if it is one of `allowed`; else ValueError that lists them."""
    if name not in allowed:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(allowed)}")
    return name


_IGNORED = frozenset(("a", "an", "the", "with", "and", "in", "puppet"))
_HATS = {"cap": "cap", "beanie": "beanie", "crown": "crown", "top_hat": "top hat"}


def identity_from_words(words: str) -> Identity:
    """An identity from words: "red striped robot with blue trousers and a yellow cap", "test 3", "random 7".

    Colours are the named ones exactly; what is not said is a plain red shirt, blue trousers and no hat; the
    coat is the first of the species. Raises ValueError that lists the allowed words.
    """
    text = " ".join(SEPARATORS.sub(" ", words.lower()).split())
    if numbered := re.fullmatch(r"(test|random)(?: (\d{1,18}))?", text):
        number = int(numbered[2] or 0)
        if numbered[1] == "random":
            return sample_identity(number)
        if number >= TEST_COUNT:
            raise ValueError(f"there is no test identity {number}: choose 0 to {TEST_COUNT - 1}")
        return test_identities()[number]
    tokens = text.replace("top hat", "top_hat").replace("no hat", "").split()
    known = {*SPECIES, *COLOURS, *PATTERNS, *_HATS, "trousers", *_IGNORED}
    if unknown := [t for t in tokens if t not in known]:
        raise ValueError(f"the theatre has no word {unknown[0]!r} for an identity: {_identity_help()}")
    species = [t for t in tokens if t in SPECIES]
    if len(species) != 1:
        raise ValueError(f"name exactly one species, not {len(species)}, in {words!r}: {_identity_help()}")
    before, after = _around(tokens, species[0])
    shirt, patterns = [t for t in before if t in COLOURS], [t for t in before if t in PATTERNS]
    if len(shirt) > 2 or len(patterns) > 1 or len(shirt) + len(patterns) < len(before):
        raise ValueError(f"write shirt colours and a pattern before {species[0]!r}: {_identity_help()}")
    worn: dict[str, str] = {}
    for i in range(0, len(after), 2):
        colour, thing = (*after[i:i + 2], "")[:2]
        if colour not in COLOURS or thing not in ("trousers", *_HATS):
            raise ValueError(f"after {species[0]!r} give trousers and hat a colour: {_identity_help()}")
        worn["trousers" if thing == "trousers" else "hat"] = colour
        if thing != "trousers":
            worn["headwear"] = _HATS[thing]
    skin, accent = COATS[species[0]][0]
    first = shirt[0] if shirt else "red"
    second = shirt[1] if len(shirt) > 1 else "yellow" if first == "white" else "white"
    return Identity(
        species[0], skin, accent, COLOURS[first], patterns[0] if patterns else "plain", COLOURS[second],
        COLOURS[worn.get("trousers", "blue")], worn.get("headwear", "none"),
        COLOURS[worn.get("hat", "yellow")],
    )


def names_a_puppet(words: str) -> bool:
    """Whether words say who it is, and not only what somebody wears."""
    return bool({*SPECIES, "test", "random"} & set(words.lower().split()))


def _around(tokens: list[str], word: str) -> tuple[list[str], list[str]]:
    """The tokens before and after `word`, without those that carry no meaning."""
    at = tokens.index(word)
    return [t for t in tokens[:at] if t not in _IGNORED], [t for t in tokens[at + 1:] if t not in _IGNORED]


def _identity_help() -> str:
    return (f"write 'red striped robot with blue trousers and a yellow cap', 'test 3' or 'random'; "
            f"species {', '.join(SPECIES)}; colours {', '.join(COLOURS)}; patterns {', '.join(PATTERNS)}; "
            f"headwear {', '.join(_HATS.values())}, no hat")
