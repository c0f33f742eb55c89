"""Kinds of learned files, which the rooms declare, so that one list can be made of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ..inputs.words import entries
from .folders import WeightFolder

DATE, TAGS, AUTHOR = "modelspec.date", "modelspec.tags", "modelspec.author"
MOST_TAGS, LONGEST = 20, 80  # what the library shows; characters of a tag or a name
Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, str]


def made_now(tags: str = "", author: str = "") -> dict[str, str]:
    """The metadata that says when a file was made, in UTC, with which tags and by whom, as model managers read it.

    Raises ValueError, naming the input, for more than the library shows.
    """
    every, name = list(dict.fromkeys(" ".join(tag.split()) for tag in entries(tags))), " ".join(author.split())
    if len(every) > MOST_TAGS:
        raise ValueError(f"tags has {len(every)} entries: use {MOST_TAGS} at most")
    for words, text in (("tags has an entry", max(every, key=len, default="")), ("author is a text", name)):
        if len(text) > LONGEST:
            raise ValueError(f"{words} of {len(text)} characters: shorten it to {LONGEST} at most")
    when = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = {DATE: when, TAGS: ", ".join(every), AUTHOR: name}
    return {key: text for key, text in made.items() if text}


@dataclass(frozen=True)
class Summary:
    """What a file says of itself: the fingerprint of its base model, or "", and what it holds in a few words."""

    base: str
    holds: str


@dataclass(frozen=True)
class LearnedKind:
    """One kind of learned file: its name in menus, its folder, and how it is told from others by its header.

    summary(shapes by key, metadata) is None for a file of another kind. misfit(model, shapes, metadata) is what does
    not fit a MODEL, or "".
    """

    name: str
    folder: WeightFolder
    summary: Callable[[Shapes, Metadata], Summary | None]
    misfit: Callable[[Any, Shapes, Metadata], str] = lambda _model, _shapes, _metadata: ""
