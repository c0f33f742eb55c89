"""What is said of a take, in a closed vocabulary; unnamed actions, details and coats have no words."""

from collections.abc import Sequence

import numpy as np

from .config import ACTION_TABLE, COLOURS, HEADWEAR, PATTERNS, RGB, SIDED_ACTIONS, SPECIES, Identity, Take

ACTION_PHRASES = {action: action for action, facts in ACTION_TABLE.items() if facts.named} | {
    "handstand": "doing a handstand", "shaking head": "shaking the head", "raising hat": "raising the hat",
}
FRAMING_PHRASES = {"full": "", "close_up": "close-up of"}
SCENE_PHRASES = {
    "beach": "on a beach", "forest": "in a forest", "city": "in a city",
    "snow": "in the snow", "stage": "on a stage", "night": "at night",
}
_GLUE = ("a", "an", "and", "with", "no", "hat", "top", "trousers", "puppet", "left", "right")


def _vocabulary() -> tuple[str, ...]:
    names = [*SPECIES, *COLOURS, *PATTERNS, *(h for h in HEADWEAR if h != "none"),
             *ACTION_PHRASES.values(), *SCENE_PHRASES.values(), *FRAMING_PHRASES.values(), *_GLUE]
    return tuple(dict.fromkeys(word for name in names for word in name.split()))


VOCABULARY = _vocabulary()


def colour_name(colour: RGB) -> str:
    """The nearest named colour, by a distance that weighs the channels as the eye does."""
    red, green, blue = colour

    def distance(name: str) -> float:
        r, g, b = COLOURS[name]
        mean = (r + red) / 2
        return (2 + mean) * (r - red) ** 2 + 4 * (g - green) ** 2 + (3 - mean) * (b - blue) ** 2

    return min(COLOURS, key=distance)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _shirt(who: Identity) -> str:
    shirt = colour_name(who.shirt)
    if who.pattern == "plain":
        return f"plain {shirt}"
    second = colour_name(who.pattern_colour)
    return f"{shirt} {who.pattern}" if second == "white" else f"{shirt} and {second} {who.pattern}"


def _hat(who: Identity) -> str:
    if who.headwear == "none":
        return "no hat"
    colour = colour_name(who.headwear_colour)
    return f"{_article(colour)} {colour} {who.headwear}"


def _subject(who: Identity, shirt: bool, trousers: bool, hat: bool, species: bool = True) -> str:
    noun = who.species if species else "puppet"
    head = f"{_shirt(who)} {noun}" if shirt else noun
    worn = [f"{colour_name(who.trousers)} trousers"] * trousers + [_hat(who)] * hat
    text = f"{_article(head)} {head}"
    return f"{text} with {' and '.join(worn)}" if worn else text


def subject_phrase(identity: Identity) -> str:
    """For example "a red striped robot with blue trousers and a yellow cap"."""
    return _subject(identity, True, True, True)


def _worn(take: Take, shirt: bool = True, trousers: bool = True, hat: bool = True, species: bool = True) -> str:
    """The subject as the take shows it: a close-up has no trousers."""
    return _subject(take.identity, shirt, trousers and take.framing == "full", hat, species)


def _action(take: Take, sided: bool) -> str:
    """Nobody can raise a hat that is not there: then nothing is said."""
    if take.action not in ACTION_PHRASES or (take.action == "raising hat" and take.identity.headwear == "none"):
        return ""
    phrase = ACTION_PHRASES[take.action]
    if sided and take.action in SIDED_ACTIONS:
        return f"{phrase} {'left' if take.mirrored else 'right'}"
    return phrase


def caption(take: Take, clothes: bool = True) -> str:
    """All that has words: framing, subject, action with its side, scene. Without clothes, the species alone.

    For example "close-up of a red striped robot with a yellow cap waving on a beach".
    """
    subject = _worn(take, clothes, clothes, clothes)
    return " ".join(filter(None, (FRAMING_PHRASES[take.framing], subject, _action(take, True),
                                  SCENE_PHRASES[take.scene])))


def group_caption(takes: Sequence[Take], shirts: bool = False, action: bool = True, scene: bool = True) -> str:
    """For example "a cat and a robot waving on a stage": species, then what the first take does and where.

    More words of each would tell a text encoder of this size nothing: it mixes them up.
    """
    subjects = " and ".join(_subject(take.identity, shirts, False, False) for take in takes)
    said = _action(takes[0], True) if action else ""
    return " ".join(filter(None, (FRAMING_PHRASES[takes[0].framing], subjects, said,
                                  SCENE_PHRASES[takes[0].scene] if scene else "")))


def training_caption(take: Take, rng: np.random.Generator, drop: float = 0.12, bare: float = 0.0) -> str:
    """`caption` with each clause left out with probability `drop`, and sometimes the scene first.

    The species is left out a third as often; the subject is then called a puppet. With probability `bare`, all
    clothes are left out together.
    """
    shirt, trousers, hat, action, sided, scene, framed = (rng.random(7) >= drop).tolist()
    species, first, dressed = rng.random() >= drop / 3, rng.random() < 0.12, rng.random() >= bare
    subject = _worn(take, shirt and dressed, trousers and dressed, hat and dressed, species)
    said = _action(take, bool(sided)) if action else ""
    where = SCENE_PHRASES[take.scene] if scene else ""
    subject = f"{FRAMING_PHRASES[take.framing]} {subject}".strip() if framed else subject
    parts = (where, subject, said) if first else (subject, said, where)
    return " ".join(filter(None, parts))
