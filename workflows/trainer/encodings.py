"""What models make of a data set, in files that every process reads when an item is drawn: never all in memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

_ONLY = "only"  # the name of a single tensor


class Encodings(Sequence):
    """Item i is what was written for i, on the CPU: tensors by name, or a tensor."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Part(self, range(self.count)[index])
        if not -self.count <= index < self.count:
            raise IndexError(index)
        tensors = load_file(self._path(index % self.count))
        return tensors[_ONLY] if tensors.keys() == {_ONLY} else tensors

    def missing(self) -> list[int]:
        """Which items have no file."""
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [i for i in range(self.count) if self._path(i).name not in present]

    def write(self, index: int, value: Any) -> None:
        """Store an item; a file is complete or not there."""
        path = self._path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = value if isinstance(value, dict) else {_ONLY: value}
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        os.replace(part, path)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08}.safetensors"


class _Part(Sequence):
    def __init__(self, whole: Encodings, indices: range):
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return _Part(self.whole, self.indices[index])
        return self.whole[self.indices[index]]
