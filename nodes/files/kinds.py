"""Kinds of learned files, which the rooms declare, so that one list can be made of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .folders import WeightFolder

DATE = "modelspec.date"
Shapes = Mapping[str, tuple[int, ...]]
Metadata = Mapping[str, str]


def made_now() -> dict[str, str]:
    """The metadata that says when a file was made, in UTC, as model managers read it."""
    return {DATE: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}


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
