"""Training data that lies in files and is read when it is drawn, in the place of lists. It imports no ComfyUI."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any


class Stored(Sequence):
    """Items that `read(index)` makes each time that they are looked at. `key` names all that decides them."""

    def __init__(self, count: int, read: Callable[[int], Any], key: str):
        self.count, self.read, self.key = count, read, key

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            indices = range(self.count)[index]
            return Stored(len(indices), lambda i: self.read(indices[i]), f"{self.key}{indices}")
        if not -self.count <= index < self.count:
            raise IndexError(index)
        return self.read(index % self.count)

    def map(self, change: Callable[[Any], Any], key: str = "") -> Stored:
        """The same items after change(item); `key` names a change that depends on more than the item."""
        return Stored(self.count, lambda i: change(self.read(i)), self.key + key)


def is_stored(items: Any) -> bool:
    """Whether these are items that are not to be held in memory together."""
    return isinstance(items, Sequence) and not isinstance(items, list | tuple | str)


def chained(*parts: Sequence) -> Sequence:
    """All items of some sequences, a list where all of them are."""
    if not any(map(is_stored, parts)):
        return list(itertools.chain.from_iterable(parts))
    places = [(part, i) for part in parts for i in range(len(part))]
    return Stored(len(places), lambda i: places[i][0][places[i][1]], "".join(getattr(p, "key", "") for p in parts))


def digest(*parts: Any) -> str:
    """16 hex digits for these names, numbers and digests."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
