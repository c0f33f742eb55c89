"""One list of all learned files: their kinds, names and versions, and those that are foreign or damaged."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import folder_paths

from ..action_identifier.files import KIND as ACTION
from ..consent import record
from ..consent.record import ConsentError
from ..files.kinds import LearnedKind
from ..fusion_embedding.files import KIND as FUSION
from ..identity_prior.files import KIND as IDENTITY
from ..video_identity.files import KIND as ADAPTER
from . import entries, index
from .entries import Entry

KINDS = (IDENTITY, ACTION, FUSION, ADAPTER)


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file as Load nodes name it, in which of ComfyUI's folders, and what is known of it."""

    folder: str
    file: str
    path: Path
    entry: Entry

    @property
    def name(self) -> str:
        return entries.name_and_version(self.file)[0]

    @property
    def version(self) -> int:
        return entries.name_and_version(self.file)[1]


def all_files(kinds: Sequence[LearnedKind] = KINDS) -> list[Listed]:
    """Every file in the folders of these kinds, by folder and name, in ComfyUI's order."""
    listed = []
    for folder in dict.fromkeys(kind.folder.name for kind in kinds):
        if folder not in folder_paths.folder_names_and_paths:
            continue
        of_folder = [kind for kind in KINDS if kind.folder.name == folder]
        places = _places(folder)
        versions = {path: version for path, version in places.values()}
        known = index.entries_of(versions, partial(entries.read, kinds=of_folder))
        listed += [Listed(folder, file, Path(path), known[path]) for file, (path, _) in places.items()]
    return listed


def names(files: Sequence[Listed]) -> list[str]:
    """The names of which there is a learned file, once each, sorted."""
    return sorted({file.name for file in files if file.entry.kind})


def choose(files: Sequence[Listed], kind: str, name: str, version: int) -> Listed:
    """The file of this kind, name and version; 0 is the newest. Raises ValueError, naming the input, for none."""
    versions = {file.version: file for file in files if file.entry.kind == kind and file.name == name}
    if not versions:
        spoilt = [file for file in files if file.name == name and file.entry.problem and not file.entry.kind]
        if spoilt:
            raise ValueError(f"name is {name!r}: its file is {spoilt[0].entry.problem}. Choose another one")
        others = ", ".join(names([file for file in files if file.entry.kind == kind])[:12])
        raise ValueError(f"name is {name!r}: there is no {kind} of that name. There are: {others or 'none'}")
    newest = max(versions)
    if version and version not in versions:
        listed = ", ".join(str(number) for number in sorted(versions)[-12:])
        raise ValueError(f"version is {version}: {name} has {listed}. Choose one of them, or 0 for the newest")
    return versions[version or newest]


def line(file: Listed, base: str = "", now: datetime | None = None) -> str:
    """A file in one line. `base` is the fingerprint of the connected model, or ""."""
    entry = file.entry
    if not entry.kind:
        return f"{record.shown(file.file)}: {entry.problem}"
    parts = [entry.holds, _fit(entry, base), consent_state(entry, now), f"made {entry.made}" if entry.made else ""]
    parts += [f"by {entry.author}" if entry.author else "", ", ".join(entry.tags), entry.problem]
    return f"{record.shown(file.name)} version {file.version}: {'; '.join(part for part in parts if part)}"


def consent_state(entry: Entry, now: datetime | None = None) -> str:
    """In a few words, whether consent holds."""
    try:
        return record.state(entry.agreed, now or datetime.now(timezone.utc))
    except ConsentError as error:
        return str(error)


def _fit(entry: Entry, base: str) -> str:
    if not entry.base:
        return "base model unknown"
    if not base:
        return f"base model {entry.base}"
    return "of the connected model" if entry.base == base else f"of another base model, {entry.base}"


def _places(folder: str) -> Mapping[str, tuple[str, index.Version]]:
    """The path and version of each listed file, by name; the first of ComfyUI's folders that has it counts."""
    roots, found = folder_paths.get_folder_paths(folder), {}
    for file in folder_paths.get_filename_list(folder):
        for root in roots:
            path = os.path.join(root, file)
            if version := index.version(path):
                found[file] = path, version
                break
    return found
