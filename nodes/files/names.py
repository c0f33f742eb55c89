"""Names of weight files: which are allowed, and how they are made safe for every platform."""

import os
import unicodedata

from ..errors import shown_by_name

EXTENSION = ".safetensors"
MAX_PART = 120  # bytes of UTF-8 per folder or file name; below any filesystem's limit with counter and ending
MAX_PARTS = 8

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³")}


@shown_by_name
class WeightFileError(ValueError):
    """A weight file was refused for its name or content; the message names the file and the fix."""


def refused(path: str | os.PathLike, problem: str, fix: str) -> WeightFileError:
    """The error to raise: which file, what is wrong, what to do."""
    return WeightFileError(f"{os.fspath(path)!r} {problem}. {fix}.")


def normalise_prefix(filename_prefix: str, of: str = "filename_prefix") -> str:
    """The file name prefix, of the input `of`, as it is used: in NFC, with `/` between folders, safe everywhere.

    Control characters and those that Windows forbids become `_`, dots and spaces at the ends of a part are
    removed, long parts are cut. Raises WeightFileError for absolute paths and `..`.
    """
    text = unicodedata.normalize("NFC", filename_prefix).replace("\\", "/")
    given = f"{of} {filename_prefix!r}"
    fix = "Use a name such as `anna` or `portraits/anna`, inside the output folder"
    if text.startswith("/") or text[1:2] == ":" or ".." in (part.strip() for part in text.split("/")):
        raise WeightFileError(f"{given} points outside the output folder. {fix}.")
    parts = [part for part in map(_safe_part, text.split("/")) if part]
    if not parts or len(parts) > MAX_PARTS:
        raise WeightFileError(f"{given} gives {len(parts)} folder and file names, not 1 to {MAX_PARTS}. {fix}.")
    return "/".join(parts)


def _safe_part(part: str) -> str:
    """One folder or file name without what any platform forbids; empty if nothing is left."""
    name = "".join("_" if character in '<>:"|?*' or _is_control(character) else character for character in part)
    name = name.encode()[:MAX_PART].decode(errors="ignore").strip(" .")
    return f"_{name}" if name.split(".")[0].strip().lower() in _RESERVED else name


def _is_control(character: str) -> bool:
    # Zero-width joiners belong to Persian, Indic and emoji spelling; direction marks can only disguise names.
    joiner = character in "\u200c\u200d"
    return not joiner and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
