"""What the library knows of a file from its header alone: which kind, what it holds, whose model, what is wrong."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..consent import record
from ..consent.record import ConsentError, ConsentRecord
from ..files import weights
from ..files.kinds import AUTHOR, DATE, MOST_TAGS, TAGS, LearnedKind
from ..files.names import EXTENSION, WeightFileError

# A file of a Save node: its name, and its number, which is the version.
_NUMBERED = re.compile(r"(.+)_(\d{5,9})_" + re.escape(EXTENSION))
_UNREADABLE = "unreadable"
_NOT_OPENED = "a pickle, which is opened only to be loaded"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file. kind is "" for a foreign or damaged one, whose `problem` says what it is.

    base: fingerprint of the base model, or "". consent: scopes, first day and end of the consent record, without
    names and notes; None without a record, "unreadable" for one that cannot be read. made: a time in ISO form.
    """

    kind: str = ""
    problem: str = ""
    holds: str = ""
    base: str = ""
    tags: tuple[str, ...] = ()
    author: str = ""
    made: str = ""
    consent: tuple[tuple[str, ...], str, str] | str | None = None

    @property
    def agreed(self) -> ConsentRecord | None:
        """The part of the consent record that says whether it holds. Raises ConsentError where it is unreadable."""
        if isinstance(self.consent, str):
            raise ConsentError("its consent record cannot be read")
        scopes, granted_on, expires = self.consent or ((), "", "")
        return ConsentRecord("recorded", tuple(scopes), "", granted_on, expires) if self.consent else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.astuple(self), ensure_ascii=False)


def from_json(text: str) -> Entry:
    """The entry that `to_json` wrote. Raises ValueError or TypeError for any other text."""
    kind, problem, holds, base, tags, author, made, consent = json.loads(text)
    if isinstance(consent, list):
        scopes, granted_on, expires = consent
        consent = tuple(scopes), granted_on, expires
    return Entry(kind, problem, holds, base, tuple(tags), author, made, consent)


def read(path: Path, kinds: Sequence[LearnedKind]) -> Entry:
    """The entry of a file that may be of one of these kinds, by its header; no tensor is read."""
    if path.suffix != EXTENSION:
        return Entry(next((kind.name for kind in kinds if kind.folder.marks(path)), ""), _NOT_OPENED)
    try:
        shapes, metadata = weights.inspect(path)
        for kind in kinds:
            if summary := kind.summary(shapes, metadata):
                return Entry(
                    kind.name, "", record.shown(summary.holds), record.shown(summary.base), tags_of(metadata),
                    record.shown(metadata.get(AUTHOR, "")),
                    record.shown(metadata.get(DATE, "")), _consent(metadata),
                )
    except (WeightFileError, ValueError) as error:
        return Entry(problem=f"damaged: {record.shown(str(error).removeprefix(repr(str(path))))}")
    return Entry(problem="foreign: not a learned file of this pack")


def tags_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The tags that a file names, at most MOST_TAGS."""
    return tuple(record.shown(tag) for tag in metadata.get(TAGS, "").split(",")[:MOST_TAGS] if tag.strip())


def name_and_version(file_name: str) -> tuple[str, int]:
    """("anna", 3) of anna_00003_.safetensors; a file of another name is the only version of its whole name."""
    match = _NUMBERED.fullmatch(file_name)
    return (match[1], int(match[2])) if match else (file_name, 1)


def _consent(metadata: Mapping[str, str]) -> tuple[tuple[str, ...], str, str] | str | None:
    try:
        consent = record.from_metadata(metadata)
    except ConsentError:
        return _UNREADABLE
    return consent and (consent.scopes, consent.granted_on, consent.expires) or None
