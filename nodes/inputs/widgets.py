"""Inputs that nodes of several rooms have, said once; those of Train and Save nodes are in training/widgets.py."""

from typing import Any

from comfy_api.latest import io

from ...kernels.spectral_guidance import HIGHEST_CUTOFF
from ..consent import gate
from ..consent import widgets as consent_widgets
from ..consent.record import UNSPECIFIED
from ..files.folders import WeightFolder
from .checked import CheckedNode, File

# A `Subject`, which an identity prior knows.
IDENTITY = io.Custom("UNDERSTUDY_IDENTITY")


class LoadNode(CheckedNode):
    """A node that reads the file of `FOLDER` that its input `FILE` names, and reads it again when it has changed, or
    when its consent record no longer holds.
    """

    FOLDER: WeightFolder
    FILE: str

    @classmethod
    def fingerprint_inputs(cls, purpose: str | None = UNSPECIFIED, **values: Any) -> str:
        name = values[cls.FILE]
        if name is None:  # a link, whose source has a fingerprint of its own
            return gate.day_if_required()
        doubts = gate.file_warnings(cls.FOLDER.find(name), purpose or UNSPECIFIED)
        return "\n".join([cls.FOLDER.fingerprint(name), *doubts])

    @classmethod
    def file(cls, tooltip: str) -> File:
        """The files that are listed."""
        return File(cls.FILE, options=cls.FOLDER.choices(), tooltip=tooltip)

    purpose = staticmethod(consent_widgets.purpose)


def fraction(id: str, default: float, tooltip: str, step: float = 0.01, **options: Any) -> io.Float.Input:
    """A share of something, 0 to 1."""
    return io.Float.Input(id, default=default, min=0.0, max=1.0, step=step, round=False, tooltip=tooltip, **options)


def percent(id: str, default: float, tooltip: str) -> io.Float.Input:
    """A place in the schedule, 0 to 1, in thousandths."""
    return fraction(id, default, tooltip, step=0.001)


def cutoff(id: str, default: float, tooltip: str, **options: Any) -> io.Float.Input:
    """A spatial frequency, in cycles per latent pixel."""
    return io.Float.Input(
        id, default=default, min=0.0, max=HIGHEST_CUTOFF, step=0.01, round=0.001, tooltip=tooltip, **options
    )


def percent_range(config: Any, what: str, note: str = "") -> list[io.Float.Input]:
    """The part of the schedule in which `what` acts; `config` has the defaults, and `note` is about the end."""
    place = f"Fraction of the schedule at which {what}"
    return [
        percent("start_percent", config.start_percent, f"{place} starts acting."),
        percent("end_percent", config.end_percent, f"{place} stops acting.{note and f' {note}'}"),
    ]


def strength(tooltip: str, default: float = 1.0, lowest: float = 0.0, highest: float = 1.0) -> io.Float.Input:
    """The weight of what a node applies: 0 is exactly off."""
    return io.Float.Input(
        "strength", default=default, min=lowest, max=highest, step=0.01, round=False, tooltip=tooltip
    )


def numbers(id: str, default: str, tooltip: str, **options: Any) -> io.String.Input:
    """What `ranges.parse_numbers` reads; `tooltip` says what counts, and which words there are."""
    return io.String.Input(
        id, default=default, advanced=True, **options,
        tooltip=f"{tooltip}, or numbers and ranges from 0, such as 4-6, 9.",
    )
