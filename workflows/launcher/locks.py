"""A lock between starts, and what they say of it. Parses on Python 3.8, as environment.py does."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path):
    """Hold a lock that dies with the process, so that two starts do not set up the same thing."""
    with open(str(path), "a+b") as file:
        waited = False
        while not _try_lock(file):
            if not waited:
                say("Another start is setting up; waiting for it")
            waited = True
            time.sleep(0.5)
        yield


def _try_lock(file) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Print a line about the set-up to standard error, since standard output belongs to the command."""
    print(text, file=sys.stderr, flush=True)
