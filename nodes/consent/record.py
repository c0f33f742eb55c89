"""Consent to be learned and shown: who agreed, to what, until when; its JSON form, and what it does not cover.

Every room whose files learn people carries a record; this module imports no ComfyUI.

A day has no time zone, and a record may be read in another one than it was typed in. So days are counted at UTC+14,
where they begin and end first on earth: nobody's consent is used after their own midnight. A moment with an offset
is exact.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta, timezone
from typing import Any

from ..errors import shown_by_name

SCOPES = ("private", "editorial", "commercial", "training")
NO_PERSON = "no person"  # in place of scopes: what is learned is nobody, so that nobody has to agree
# What a result is for, where nobody has said it: then no scope is asked for.
UNSPECIFIED = "unspecified"
PURPOSES = (UNSPECIFIED, *SCOPES)
ENTRY = "understudy_consent"  # of a weight file's metadata
MISSING = "there is no consent record"

_LONGEST_NOTE = 100_000  # characters; a weight file's header has room for several
_LONGEST = 1000  # of the other texts
_MOST_REFERENCES = 1000
_VERSION = 1
_SHOWN = 80  # characters of one text in a message
_FIRST_ZONE = timezone(timedelta(hours=14))
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories of what ends lines, turns or hides text
_JOINERS = "\u200c\u200d"  # spelling in Persian, Indic scripts and emoji


@shown_by_name
class ConsentError(ValueError):
    """A consent record that is not valid, or does not cover what is asked; the message says what and what to do."""


# Without a repr: ComfyUI writes a failing node's inputs into its report.
@dataclass(frozen=True, repr=False)
class ConsentRecord:
    """What was typed, and nothing else: who may be learned and shown, for which of SCOPES, who allowed it and when.

    With NO_PERSON as its one scope, subject is a drawn figure or a thing, and every purpose holds. granted_on
    is a day; expires is the last day, or a moment with an offset; either is empty where there is none. references are
    the SHA-256 of reference pictures, 64 hex digits each. The record without any content stands for none: where it
    takes another's place, that one is removed. Raises ConsentError, naming the field.
    """

    subject: str = ""
    scopes: tuple[str, ...] = ()
    granted_by: str = ""
    granted_on: str = ""
    expires: str = ""
    note: str = ""
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("subject", "granted_by", "granted_on", "expires", "note"):
            _check_text(name, getattr(self, name))
        scopes = *SCOPES, NO_PERSON
        _check_list("scopes", self.scopes, len(SCOPES), scopes.__contains__, f"use {', '.join(scopes)}")
        if self.is_no_person and len(self.scopes) > 1:
            raise ConsentError(f"scopes has {NO_PERSON} beside others: choose it alone, for every purpose")
        _check_list("references", self.references, _MOST_REFERENCES, _SHA256.fullmatch, "use SHA-256, in hex digits")
        if not self:
            return
        for name, fix in (("subject", "name who agreed, or use a pseudonym"), ("scopes", "choose at least one")):
            if not getattr(self, name):
                raise ConsentError(f"{name} is empty: {fix}")
        if self.granted_on:
            _day("granted_on", self.granted_on)
        if self.expires and not _DAY.fullmatch(self.expires):
            _moment(self.expires)
        elif self.expires:
            _day("expires", self.expires)

    def __bool__(self) -> bool:
        """Whether anything is in it."""
        return any(getattr(self, field.name) for field in fields(self))

    @property
    def is_no_person(self) -> bool:
        """Whether the record says that its subject is no real person."""
        return NO_PERSON in self.scopes

    def has_begun(self, now: datetime) -> bool:
        """Whether `now`, which knows its time zone, is not before the day on which consent was granted."""
        return not self.granted_on or _day("granted_on", self.granted_on) <= day_of(now)

    def has_expired(self, now: datetime) -> bool:
        """Whether `now`, which knows its time zone, is after the last day at UTC+14, or not before the moment."""
        if not self.expires:
            return False
        if _DAY.fullmatch(self.expires):
            return day_of(now) > _day("expires", self.expires)
        return now >= _moment(self.expires)

    def to_json(self) -> str:
        """The record for a file's metadata; what is empty is left out."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name)}
        return json.dumps({"version": _VERSION, **content}, ensure_ascii=False)


def day_of(now: datetime) -> date:
    """The day that counts at `now`, which knows its time zone."""
    return now.astimezone(_FIRST_ZONE).date()


def from_json(text: str) -> ConsentRecord:
    """The record that `to_json` wrote. Raises ConsentError, naming what is wrong, for any other text."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConsentError("it is not JSON, or says something twice") from error
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise ConsentError(f"it is not of version {_VERSION}: a newer version of this pack may have written it")
    if unknown := content.keys() - {field.name for field in fields(ConsentRecord)}:
        raise ConsentError(f"it has the unknown field {shown(min(unknown))!r}")
    return ConsentRecord(**{
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    })


def to_metadata(record: ConsentRecord | None) -> dict[str, str]:
    """The entry of a weight file's metadata; none for no record, or for the empty one."""
    return {ENTRY: record.to_json()} if record else {}


def from_metadata(metadata: Mapping[str, str]) -> ConsentRecord | None:
    """The record in a file's metadata, or None. Raises ConsentError for one that cannot be read."""
    return from_json(metadata[ENTRY]) if ENTRY in metadata else None


def problems(record: ConsentRecord | None, purpose: str, now: datetime) -> list[str]:
    """What the record does not cover at `now`, which knows its time zone, for one of PURPOSES: a line for each."""
    if not record:
        return [MISSING]
    lines = []
    if not record.has_begun(now):
        lines.append(f"consent of {shown(record.subject)} begins only on {record.granted_on}")
    if record.has_expired(now):
        lines.append(f"consent of {shown(record.subject)} ended with {record.expires}")
    if purpose not in (UNSPECIFIED, *record.scopes) and not record.is_no_person:
        lines.append(f"consent of {shown(record.subject)} is for {', '.join(record.scopes)}, and not for {purpose}")
    return lines


def state(record: ConsentRecord | None, now: datetime) -> str:
    """In a few words, without a name: whether a record holds at `now`, which knows its time zone, and for what."""
    if not record:
        return "no consent record"
    if record.has_expired(now):
        return f"consent ended with {record.expires}"
    if not record.has_begun(now):
        return f"consent begins only on {record.granted_on}"
    held = "no real person" if record.is_no_person else f"consent for {', '.join(record.scopes)}"
    return held + (f" until {record.expires}" if record.expires else "")


def describe(record: ConsentRecord) -> str:
    """The record in one line, without its note and pictures."""
    subject = shown(record.subject)
    line = f"no real person: {subject}" if record.is_no_person else (
        f"consent of {subject} for {', '.join(record.scopes)}"
    )
    line += f", from {shown(record.granted_by)}" if record.granted_by else ""
    line += f", since {record.granted_on}" if record.granted_on else ""
    return line + (f", until {record.expires}" if record.expires else "")


def shown(text: str) -> str:
    """A text from a file as a message may show it: one short line, without what steers a screen."""
    kept = (c if c in _JOINERS or unicodedata.category(c) not in _STEERING else " " for c in text[:_LONGEST])
    line = " ".join("".join(kept).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, whose fields other readers might take the first of. Raises ValueError for one that repeats."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConsentError(f"{name} is of type {type(value).__name__}: use a text")
    longest = _LONGEST_NOTE if name == "note" else _LONGEST
    if len(value) > longest:
        raise ConsentError(f"{name} has {len(value)} characters: shorten it to {longest} at most")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConsentError(f"{name} has half a character at place {error.start + 1}: type it again") from error


def _check_list(name: str, values: Any, most: int, allowed: Any, fix: str) -> None:
    if not isinstance(values, tuple):
        raise ConsentError(f"{name} is of type {type(values).__name__}: use a list")
    if len(values) > most:
        raise ConsentError(f"{name} has {len(values)} entries: use {most} at most")
    for value in values:
        if not isinstance(value, str) or not allowed(value):
            raise ConsentError(f"{name} has the entry {shown(str(value))!r}: {fix}")


def _day(name: str, text: str) -> date:
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:  # such as the 31st of June
        pass
    raise ConsentError(f"{name} is {shown(text)!r}: write a day such as 2027-12-31")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        fix = "write a day such as 2027-12-31, or a moment with its offset such as 2027-12-31T18:00+09:00"
        raise ConsentError(f"expires is {shown(text)!r}: {fix}")
    return moment
