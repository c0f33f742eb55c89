"""What is remembered of files, so that each is read and hashed once for each time that it is written.

An SQLite database, since two ComfyUIs may write it at once. It is a cache: whoever deletes it loses nothing.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import folder_paths

from ..messages import tell
from . import entries
from .entries import Entry

_FORMAT = 1
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INT, modified INT, changed INT, entry TEXT,"
    " sha256 TEXT)"
)
# Another process may have hashed the file meanwhile.
_REMEMBER = (
    "INSERT INTO files VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (path) DO UPDATE SET sha256 = CASE WHEN"
    " (size, modified, changed) = (excluded.size, excluded.modified, excluded.changed) THEN sha256 END,"
    " size = excluded.size, modified = excluded.modified, changed = excluded.changed, entry = excluded.entry"
)
_WAIT = 10  # seconds for another process that writes
_BLOCK = 1 << 20
# File systems count time in steps of up to 2 s, in which a second writing of equal size would not show.
_SETTLED = 2_000_000_000
Version = tuple[int, int, int]  # size in bytes, and the times of content and of name in ns
Result = TypeVar("Result")


def version(path: str | os.PathLike) -> Version | None:
    """What changes when a file is written; None where it is gone or is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def entries_of(paths: Mapping[str, Version], read: Callable[[Path], Entry]) -> dict[str, Entry]:
    """The entry of each path, remembered or read now; what is remembered of deleted files is forgotten."""

    def remembered(database: sqlite3.Connection) -> list[tuple[str, int, int, int, str]]:
        return database.execute("SELECT path, size, modified, changed, entry FROM files").fetchall()

    known, gone = {}, []
    for path, *times, text in _with_index(remembered, []):
        if path not in paths and not os.path.exists(path):
            gone.append((path,))
        if paths.get(path) != tuple(times):
            continue
        with contextlib.suppress(ValueError, TypeError):  # written by another version of the pack
            known[path] = entries.from_json(text)
    added = {path: read(Path(path)) for path in paths if path not in known}
    rows = [(path, *paths[path], entry.to_json()) for path, entry in added.items() if _is_settled(paths[path])]

    def remember(database: sqlite3.Connection) -> None:
        database.executemany(_REMEMBER, rows)
        database.executemany("DELETE FROM files WHERE path = ?", gone)

    if rows or gone:
        _with_index(remember, None)
    return known | added


def sha256(path: str) -> str:
    """The SHA-256 of a listed file, 64 hex digits, remembered or computed now. Raises OSError."""
    before = version(path)

    def remembered(database: sqlite3.Connection) -> str | None:
        row = database.execute("SELECT size, modified, changed, sha256 FROM files WHERE path = ?", (path,)).fetchone()
        return row[3] if row and row[:3] == before else None

    if known := _with_index(remembered, None):
        return known
    digest = _hashed(path)
    if before is not None and before == version(path) and _is_settled(before):
        where = "path = ? AND size = ? AND modified = ? AND changed = ?"
        statement = f"UPDATE files SET sha256 = ? WHERE {where}"
        _with_index(lambda database: database.execute(statement, (digest, path, *before)).rowcount, 0)
    return digest


def _hashed(path: str) -> str:
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            comfy.model_management.throw_exception_if_processing_interrupted()
            content.update(block)
    return content.hexdigest()


def _is_settled(known: Version) -> bool:
    return time.time_ns() - max(known[1:]) > _SETTLED


def _with_index(work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
    """work(database) in one transaction; `otherwise`, and the node says why, where the index cannot be used."""
    path = Path(folder_paths.get_system_user_directory("understudy")) / "library.sqlite3"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _in_database(path, work)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # damaged, or no database: it is made again
            path.unlink(missing_ok=True)
            return _in_database(path, work)
    except (sqlite3.Error, OSError) as error:  # another process holds it, or the disk is full
        tell("Identity Library", [f"files are read again each time, since {path} fails: {error}"], logging.WARNING)
        return otherwise


def _in_database(path: Path, work: Callable[[sqlite3.Connection], Result]) -> Result:
    with contextlib.closing(sqlite3.connect(path, timeout=_WAIT)) as database, database:
        database.execute("PRAGMA secure_delete = ON")  # what is forgotten is not left in the file
        database.execute("PRAGMA synchronous = OFF")  # a cache: what a crash damages is made again
        if database.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
            database.execute("DROP TABLE IF EXISTS files")
            database.execute(f"PRAGMA user_version = {_FORMAT}")
        database.execute(_TABLE)
        return work(database)
