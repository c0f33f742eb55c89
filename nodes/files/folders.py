"""Folders of weight files, which the rooms declare, and the files that ComfyUI lists in them."""

import dataclasses
import functools
import os
import re
import stat
from pathlib import Path

import folder_paths

from . import contents
from .names import refused

_BEGINNING = 256 << 10  # bytes; a header of a 14-billion-parameter model's adapter has fewer
_LONGEST_HEADER = 8 << 20  # bytes; metadata such as a long note may be before the names


@dataclasses.dataclass(frozen=True)
class WeightFolder:
    """A list of models in ComfyUI, of the files in `models/<name>` and `output/<name>` with these extensions.

    The lists that ComfyUI has by itself, such as `loras`, need no extensions and are not registered. Of a list that
    holds other files, too, `mark` is the expression that the first bytes of ours hold.
    """

    name: str
    extensions: tuple[str, ...] = ()
    mark: bytes = b""

    def register(self) -> None:
        """Add the list to ComfyUI; calling it again changes nothing."""
        for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
            folder_paths.add_model_folder_path(self.name, os.path.join(parent, self.name))
        paths, _ = folder_paths.folder_names_and_paths[self.name]
        folder_paths.folder_names_and_paths[self.name] = (paths, set(self.extensions))

    def choices(self) -> list[str]:
        """The listed files by relative name, those with the mark; none if ComfyUI does not have the list."""
        if self.name not in folder_paths.folder_names_and_paths:
            return []
        return [name for name in folder_paths.get_filename_list(self.name) if not self.mark or self._is_marked(name)]

    def _is_marked(self, name: str) -> bool:
        return self.marks(folder_paths.get_full_path(self.name, name))

    def marks(self, path: str | os.PathLike | None) -> bool:
        """Whether a file holds the mark; False where it cannot be read."""
        try:
            status = os.stat(path)
            known = os.fspath(path), status.st_mtime_ns, status.st_size
            return stat.S_ISREG(status.st_mode) and _begins_with(self.mark, *known)
        except (OSError, TypeError):  # deleted meanwhile, or not to be read
            return False

    def find(self, name: str) -> Path:
        """The path of a listed file. Raises WeightFileError if it is gone."""
        path = folder_paths.get_full_path(self.name, name)
        if path is None:
            folders = " or ".join(folder_paths.get_folder_paths(self.name))
            raise refused(name, "was not found", f"Put it into {folders} and reload the node list")
        return Path(path)

    def fingerprint(self, name: str) -> str:
        """What `fingerprint_inputs` of a Load node returns: it changes with the file's content."""
        return contents.digest(self.find(name))


@functools.lru_cache(maxsize=16384)
def _begins_with(mark: bytes, path: str, _modified: int, _size: int) -> bool:
    """Whether the expression is in the file's header, or in the first bytes, where other formats have names; again
    if it was changed.
    """
    with open(path, "rb") as file:
        first = file.read(8)
        header = int.from_bytes(first, "little")
        return re.search(mark, first + file.read(header if header <= _LONGEST_HEADER else _BEGINNING)) is not None


LORAS = WeightFolder("loras")
