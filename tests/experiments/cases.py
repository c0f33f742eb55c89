"""Who does what in a case of an experiment, by the seeds of PROTOCOL.md; every take has a true picture and mask.

For a method m (1 frequency, 2 identity, 3 action, 4 fusion, 5 video, 6 long take):

    people(development)            24 identities: the test ones, or development ones with none of their words
    generator(m, case, development)    draws the takes of a case: world.staged(who, action, scene, generator, ...)
    noise_seed(m, case, development)   of the case's first noise, the same for every arm
    another(generator, options, *taken)    one of the options that is not taken: another scene, light or puppet
    drawn(take, size), pictures(takes)     the truth: image, parts, mask, joints; or images alone

Below them are the cases of the first three methods; the others' stand in their scripts, made with the same functions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from pack.nodes.puppets import captions, render, world
from pack.nodes.puppets.config import (
    COLOURS,
    LIGHTS,
    NAMED_ACTIONS,
    SCENES,
    SIDED_ACTIONS,
    SPECIES,
    UNNAMED_ACTIONS,
    Identity,
    Picture,
    Take,
)

FREQUENCY, IDENTITY, ACTION, FUSION, VIDEO, LONG_TAKE = range(1, 7)
DEVELOPMENT, TAKES = 0xDE7, 0x11
PEOPLE = world.TEST_COUNT
DEVELOPMENT_ACTIONS = ("starfish", "hugging")  # of the unnamed ones, for method 3
T = TypeVar("T")


@functools.cache
def people(development: bool = False) -> tuple[Identity, ...]:
    """24 identities, species in turn; the last 16 have a detail that no word names."""
    if not development:
        return world.test_identities()
    rng, found = np.random.default_rng(DEVELOPMENT), []
    while len(found) < PEOPLE:
        who = world.sample_identity(int(rng.integers(2**31)))
        if who.species == SPECIES[len(found) % 8] and (who.detail == "none") == (len(found) < 8):
            found.append(who)
    return tuple(found)


def worded(identity: Identity) -> Identity:
    """The identity that its caption describes: named colours at their centres, no detail."""

    def centre(colour):
        return COLOURS[captions.colour_name(colour)]

    return dataclasses.replace(
        identity, shirt=centre(identity.shirt), pattern_colour=centre(identity.pattern_colour),
        trousers=centre(identity.trousers), headwear_colour=centre(identity.headwear_colour), detail="none",
    )


def generator(method: int, case: int, development: bool = False) -> np.random.Generator:
    """Draws what is by chance in a case."""
    return np.random.default_rng([DEVELOPMENT if development else TAKES, method, case])


def noise_seed(method: int, case: int, development: bool = False) -> int:
    """Of the case's first noise; development's lie apart."""
    return 10_000_000 * method + 5_000_000 * development + case


def another(rng: np.random.Generator, options: Sequence[T], *taken: T) -> T:
    """One of `options` that is none of `taken`, each as likely."""
    return world.pick(rng, [option for option in options if option not in taken])


@functools.lru_cache(maxsize=2048)
def drawn(take: Take, size: int = 128) -> Picture:
    """The true picture: image uint8 [size, size, 3], parts, mask, joints. Do not write to it."""
    return render.render(take, size)


def pictures(takes: Sequence[Take], size: int = 128) -> np.ndarray:
    """uint8 [N, size, size, 3]."""
    return np.stack([drawn(take, size).image for take in takes])


def masks(takes: Sequence[Take], size: int = 128) -> np.ndarray:
    """Where the puppets truly are, bool [N, size, size]."""
    return np.stack([drawn(take, size).mask for take in takes])


# ------------------------------------------------------------------------------------------ 1 frequency guidance


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A source standing; drivers of another species in another scene and light, one in a wrong action; the truth."""

    source: Take
    driver: Take
    wrong: Take
    truth: Take


def transfer(case: int, development: bool = False) -> Transfer:
    """Case of frequency guidance. The truth differs from the source in the action alone, an unnamed one."""
    rng, everybody = generator(FREQUENCY, case, development), people(development)
    who = everybody[case % PEOPLE]
    driver = world.pick(rng, [other for other in everybody if other.species != who.species])
    action = UNNAMED_ACTIONS[(case + case // PEOPLE) % len(UNNAMED_ACTIONS)]
    scene, light = world.pick(rng, SCENES), world.pick(rng, tuple(LIGHTS))
    source = world.staged(who, "standing", scene, rng, light=light, view="centre")
    view = world.pick(rng, ("left", "right", "far")) if case % 2 else "centre"
    driving = world.staged(
        driver, action, another(rng, SCENES, scene), rng, light=another(rng, tuple(LIGHTS), light), view=view
    )
    # The driver's own moment and side are what is to be taken over.
    truth = dataclasses.replace(source, action=action, phase=driving.phase, mirrored=driving.mirrored)
    wrong = dataclasses.replace(driving, action=another(rng, UNNAMED_ACTIONS, action))
    return Transfer(source, driving, wrong, truth)


# ------------------------------------------------------------------------------------------------ 2 identity prior

SUBJECTS, EDITS, LEARNED = 16, 4, 4  # subjects with EDITS cases each, learned from LEARNED pictures


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture that was not learned, and the same puppet in the same scene and light doing something else."""

    source: Take
    truth: Take

    @property
    def mirrored(self) -> bool:
        """Whether the same action is asked for to the other side."""
        return self.source.action == self.truth.action


@dataclasses.dataclass(frozen=True)
class Subject:
    """A puppet by the takes that it is learned from, and the edits of others."""

    learned: tuple[Take, ...]
    edits: tuple[Edit, ...]

    @property
    def identity(self) -> Identity:
        return self.learned[0].identity


def subject(index: int, development: bool = False) -> Subject:
    """Subject `index` of 16: three edits to actions that it was not learned in, and one to the other side."""
    rng, who = generator(IDENTITY, index, development), people(development)[8 + index]
    allowed = [action for action in NAMED_ACTIONS if (who.species, action) not in world.HELD_OUT_PAIRS]
    sided = world.pick(rng, [action for action in allowed if action in SIDED_ACTIONS])
    order = [allowed[int(i)] for i in rng.permutation(len(allowed))]
    learned, new = order[:LEARNED], order[LEARNED:LEARNED + EDITS - 1]

    def staged(action: str) -> Take:
        return world.staged(who, action, world.pick(rng, SCENES), rng, view="centre")

    shown = tuple(staged(action) for action in learned)
    edits = []
    for action in new:
        source = staged(world.pick(rng, learned))
        edits.append(Edit(source, dataclasses.replace(source, action=action)))
    source = staged(sided)
    edits.append(Edit(source, dataclasses.replace(source, mirrored=not source.mirrored)))
    return Subject(shown, tuple(edits))


# ---------------------------------------------------------------------------------------------- 3 action identifier

PUPPETS, NOISES, EXEMPLARS = 12, 4, 5
TEST_ACTIONS = tuple(action for action in UNNAMED_ACTIONS if action not in DEVELOPMENT_ACTIONS)


def exemplars(action: str) -> list[Take]:
    """Five takes that share more than the action: a bear in a red striped shirt, and the scene."""
    rng = generator(ACTION, 1000 + UNNAMED_ACTIONS.index(action))
    scene, takes = exemplar_scene(action), []
    while len(takes) < EXEMPLARS:
        who = world.sample_identity(int(rng.integers(2**31)))
        if who.species == "bear" and captions.colour_name(who.trousers) != "red":
            worn = {"shirt": COLOURS["red"], "pattern": "striped", "pattern_colour": COLOURS["white"]}
            who = dataclasses.replace(who, detail="none", **worn)
            takes.append(world.staged(who, action, scene, rng, light="day", view="centre"))
    return takes


def exemplar_scene(action: str) -> str:
    """The scene that an action's exemplars share."""
    return SCENES[UNNAMED_ACTIONS.index(action) % len(SCENES)]


def performers(action: str, development: bool = False) -> list[Take]:
    """Twelve puppets (six in development) as words say them, in the action: no bear, no red shirt, other scenes.

    All in daylight: no word could ask for another light, and under it the same cloth has another colour.
    """
    index, takes = UNNAMED_ACTIONS.index(action), []
    for who in people(development):
        if who.species != "bear" and captions.colour_name(who.shirt) != "red":
            rng = generator(ACTION, PUPPETS * index + len(takes), development)
            scene = another(rng, SCENES, exemplar_scene(action))
            takes.append(world.staged(worded(who), action, scene, rng, light="day"))
    return takes[:PUPPETS // 2 if development else PUPPETS]
