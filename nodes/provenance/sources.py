"""The files that went into a result, which takes the graph, ComfyUI's folders and the files' own claims together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..files import contents
from . import files, signing
from .method import Ingredient, Trace


@dataclasses.dataclass
class Sources:
    """Ingredients with their paths, or None where c2pa cannot read the file; what to tell, and to warn of."""

    ingredients: list[tuple[Ingredient, Path | None]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def gather(traced: Trace, typed: str, signed: bool) -> Sources:
    """Pictures, videos and sounds that the graph loads or `typed` names, one per line, and learned files.

    `signed` says whether the result will carry their manifests. Raises ValueError, naming the input, for a typed name
    that is no such file in ComfyUI's folders.
    """
    named: dict[Path, tuple[str, set[str]]] = {}
    for line in filter(None, map(str.strip, typed.splitlines())):
        path = files.find_media(line)
        if path is None or not path.is_file():
            raise ValueError(
                f"sources has {line[:80]!r}, which is no picture, video or sound in ComfyUI's input folder: check "
                "the name, or put ' [output]' behind a file of the output folder"
            )
        named.setdefault(path, (path.name, set()))
    gathered = Sources()
    for name, text in traced.texts.items():
        if (path := files.find_media(name)) and path.is_file():
            named.setdefault(path, (path.name, set()))[1].update(text.uses or text.inputs)
    if traced.folders:
        folders = ", ".join(traced.folders)
        gathered.warnings.append(f"the files in {folders} are not named one by one: list them in sources")
    for path, (name, uses) in sorted(named.items()):
        _add(gathered, path, name, tuple(sorted(uses)), signed)
    for name, text in sorted(traced.texts.items()):
        for folder, path in files.find_learned(name):
            each = Ingredient(path.name, contents.sha256(path), (f"model in {folder}", *text.inputs))
            gathered.ingredients.append((each, None))
    return gathered


def _add(gathered: Sources, path: Path, name: str, uses: tuple[str, ...], signed: bool) -> None:
    """Add a file with what it claims, and say what becomes of that."""
    source_type, missing, readable = "", "", True
    try:
        source_type = files.source_type(path)
    except ValueError as error:
        missing = f"its label cannot be read: {error}"
    if signed:
        report, problem = signing.read(path)
        if report is not None:
            gathered.notes.append(f"{name}: its signed manifest becomes part of this one")
        readable = not problem or problem.startswith(signing.ELSEWHERE)
        missing = "; ".join(filter(None, (missing, problem)))
    elif files.has_manifest(path):
        missing = "; ".join(filter(None, (missing, "its signed manifest is not in this unsigned file")))
    if missing:
        gathered.warnings.append(f"{name}: {missing}; keep that file too, since its claims are not all in the result")
    each = Ingredient(name, contents.sha256(path), uses, files.content_type(path), source_type, missing)
    gathered.ingredients.append((each, path if readable else None))
