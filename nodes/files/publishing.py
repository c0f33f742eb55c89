"""Atomic writes: a file is written under a temporary name, synced and checked, then linked to a free name.

After a crash there is a complete file or none, and the next save deletes what the crash left behind.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted: the sweep needs no lock there
    fcntl = None

from .names import EXTENSION, WeightFileError, normalise_prefix, refused

_TEMPORARY = ".understudy-"
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def save_content(
    content: bytes, folder: str, prefix: str, check: Callable[[Path], None], extension: str = EXTENSION,
    size: tuple[int, int] = (0, 0),
) -> Path:
    """Write `output/<folder>/<prefix>_00001_<extension>`, with the next free number; returns its path.

    `prefix` is normalised; `size`, width and height, stands for ComfyUI's placeholders in it. Raises WeightFileError
    where a link leads outside; OSError, leaving nothing behind, when the disk fails or is full.
    """
    output = folder_paths.get_output_directory()
    root = os.path.join(output, folder)
    with said(prefix, root):
        if not folder_paths.is_within_directory(output, os.path.dirname(os.path.join(root, prefix))):
            raise refused(prefix, "leaves the output folder through a link", "Use another subfolder")
        target, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root, *size)
        sweep(target)
        return publish(content, Path(target), name, counter, check, extension)


@contextlib.contextmanager
def said(name: str, folder: str | os.PathLike) -> Iterator[None]:
    """Errors of the disk in this block say which file could not be written to which folder, why, and what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, OSError):  # by a block within this one
            raise
        denied = error.errno in _DENIED
        fix = "Let the user who runs ComfyUI write there" if denied else "Free some space"
        problem = f"{name!r} could not be saved in {os.fspath(folder)!r}, so nothing was written: {error.strerror}"
        raise OSError(error.errno, f"{problem}. {fix}, or choose another folder") from error


def obstacle(folder: str, filename_prefix: str | None) -> str:
    """What will keep a file of this prefix out of `output/<folder>`, known before there is one; empty if nothing is.

    Nothing is written. A prefix that a link brings is None, and then the folder alone counts.
    """
    try:
        prefix = normalise_prefix(filename_prefix or "file").removeprefix(f"{folder}/")
        root = os.path.join(folder_paths.get_output_directory(), folder)
        place = os.path.dirname(os.path.join(root, prefix))
        while not os.path.exists(place):  # what is missing is made
            place = os.path.dirname(place)
        with said(prefix, root):
            number = errno.EACCES if os.path.isdir(place) else errno.ENOTDIR
            effective = os.access in os.supports_effective_ids
            if number == errno.ENOTDIR or not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
                raise OSError(number, f"{os.strerror(number)}: {place}")
    except (OSError, WeightFileError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def publish(
    content: bytes, folder: Path, name: str, counter: int, check: Callable[[Path], None], extension: str = EXTENSION
) -> Path:
    """Write `<name>_<counter>_<extension>`, with the first free number from `counter` on; returns its path.

    `check` is called with the temporary file, which is published unless it raises.
    """
    return _publish(content, folder, check, lambda written: _link_next(written, folder, name, counter, extension))


def publish_as(content: bytes, path: Path) -> Path:
    """Write `path`, a file beside another one. Raises FileExistsError where there is one, and OSError."""
    return _publish(content, path.parent, lambda _: None, lambda written: _rename_exclusively(written, path))


def _publish(content: bytes, folder: Path, check: Callable[[Path], None], link: Callable[[Path], Path]) -> Path:
    temporary, descriptor = _open_temporary(folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            check(temporary)
            if os.name != "nt":  # linked while open, so that the lock still keeps the sweep away
                return link(temporary)
        return link(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: str | os.PathLike) -> None:
    """Delete the temporary files that killed processes left behind: those that no process has locked."""
    for path in Path(folder).glob(f"{_TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError):  # gone already, or open elsewhere
            if fcntl is None:
                path.unlink()
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """A new file in `folder`, locked for as long as this process has it open."""
    while True:
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
        if _lock(descriptor) and os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)  # another process swept it between its creation and the lock
            continue
        return temporary, descriptor


def _link_next(temporary: Path, folder: Path, name: str, counter: int, extension: str) -> Path:
    """Give the temporary file the first free number from `counter` on."""
    while True:
        path = folder / f"{name}_{counter:05}_{extension}"
        try:
            _rename_exclusively(temporary, path)
        except FileExistsError:  # another process took the number in the meantime
            counter += 1
            continue
        _sync_folder(folder)
        return path


def _rename_exclusively(source: Path, target: Path) -> Path:
    """Returns the target. Raises FileExistsError where there is one."""
    if os.name == "nt":
        os.rename(source, target)  # refuses an existing target there
        return target
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # exFAT and some network folders have no links: reserve the name with an empty file, then replace it.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(source, target)
        except OSError:
            target.unlink()
            raise
    return target


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    # Some network folders cannot be synced; the file itself is on the disk by now.
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked elsewhere, or a filesystem without locks
        return False
    return True
