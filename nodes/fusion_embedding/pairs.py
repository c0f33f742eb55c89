"""Training pairs of source, pose and target: a separate file, as they come from inputs or from a folder."""

import contextlib
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps

from ..files import contents
from ..inputs.pictures import check_pictures, colour
from ..training.stored import Stored, digest
from .layout import FusionError
from .method import check_poses

NONE = "none"
ROLES = ("source", "pose", "target")
_GREY = 0.5  # what an encoder sees of a target outside of its mask
MASK = "mask"  # of the target; a folder may lack it
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What PIL raises for a truncated or damaged file, or one that claims to be huge.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Pair(NamedTuple):
    """Pictures [1, H, W, 3] in 0..1; the pose is a drawing of the person in the target."""

    source: torch.Tensor
    pose: torch.Tensor
    target: torch.Tensor


class Pairs(Protocol):
    """Read by index, one pair at a time, so that a data set may be larger than memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def target(self, index: int) -> torch.Tensor:
        """The target alone."""

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target in pixels, without reading its pixels."""

    def digest(self) -> str:
        """A short name for this data, which tells whether a resumed run trains on the same."""


class ListedPairs:
    """Batches and lists of a graph, not copied; one source may serve all."""

    def __init__(self, source: Sequence[torch.Tensor], pose: Sequence[torch.Tensor], target: Sequence[torch.Tensor]):
        self.pictures = [_views(batches, name) for batches, name in zip((source, pose, target), ROLES, strict=True)]
        counts = {name: len(views) for name, views in zip(ROLES, self.pictures, strict=True)}
        self.count = counts["target"]
        if counts["pose"] != self.count or counts["source"] not in (1, self.count):
            numbers = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise FusionError(
                f"the numbers of pictures differ ({numbers}): connect one pose per target, and one source per target "
                "or one for all"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        pair = Pair(*(
            colour(views[index % len(views)], name, FusionError).clone()
            for name, views in zip(ROLES, self.pictures, strict=True)
        ))
        check_poses(pair.pose, f"pose {index + 1}")
        return pair

    def target(self, index: int) -> torch.Tensor:
        targets = self.pictures[2]
        return colour(targets[index % len(targets)], ROLES[2], FusionError)

    def size(self, index: int) -> tuple[int, int]:
        target = self.pictures[2]
        return tuple(target[index % len(target)].shape[1:3])

    def digest(self) -> str:
        content = hashlib.sha256()
        for views in self.pictures:
            for picture in views:
                content.update(f"{tuple(picture.shape)}\n".encode())
                content.update(np.ascontiguousarray(picture.cpu().float().numpy()).tobytes())
        return content.hexdigest()[:16]


class FolderPairs:
    """A folder with the folders source, pose and target, in which files of the same name are a pair."""

    def __init__(self, folder: Path):
        self.folder = folder
        by_role = {role: _files(folder / role) for role in ROLES}
        names = [set(files) for files in by_role.values()]
        if not all(names):
            empty = next(role for role, files in by_role.items() if not files)
            raise FusionError(f"{folder / empty} has no picture: {folder} needs pictures in {', '.join(ROLES)}")
        incomplete = sorted(set.union(*names) - set.intersection(*names))
        if incomplete:
            others = f" and {len(incomplete) - 1} others" if len(incomplete) > 1 else ""
            raise FusionError(
                f"{incomplete[0]!r}{others} in {folder}: not in all of {', '.join(ROLES)}: give the pictures of a "
                "pair the same name"
            )
        self.files = [tuple(by_role[role][name] for role in ROLES) for name in sorted(names[0])]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        pair = Pair(*(_read(path) for path in self.files[index]))
        check_poses(pair.pose, str(self.files[index][1]))
        return pair

    def target(self, index: int) -> torch.Tensor:
        return _read(self.files[index][2])

    def size(self, index: int) -> tuple[int, int]:
        with _open_picture(self.files[index][2]) as image:
            width, height = image.size
            rotated = image.getexif().get(0x0112, 1) >= 5  # the camera was turned by 90 degrees
        return (width, height) if rotated else (height, width)

    def masks(self) -> Stored | None:
        """A mask [1, H, W, 1] for each pair, from the folder `mask` if there is one. Raises FusionError for a gap."""
        folder = self.folder / MASK
        if not folder.is_dir():
            return None
        files = _files(folder)
        wanted = [_name(paths[2]) for paths in self.files]
        missing = [name for name in wanted if name not in files]
        if missing:
            fix = "give each pair a mask of its name, or remove the folder"
            raise FusionError(f"{folder} has no {missing[0]!r}: {fix}")
        digests = digest(*(contents.digest(files[name]) for name in wanted))
        return Stored(len(wanted), lambda i: _read(files[wanted[i]])[..., :1], digests)

    def digest(self) -> str:
        content = hashlib.sha256()
        for path in itertools.chain.from_iterable(self.files):
            try:
                content.update(contents.digest(path).encode())
            except OSError as error:
                raise FusionError(f"{path} cannot be read ({error.strerror}): replace or remove the pair") from error
        return content.hexdigest()[:16]


class MaskedPairs:
    """Pairs whose targets are grey outside of `masks` [1, H, W, 1], as far as `floor`, 0 to 1, is below 1."""

    def __init__(self, pairs: Pairs, masks: Sequence[torch.Tensor], floor: float):
        self.pairs, self.masks, self.floor = pairs, masks, floor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        pair = self.pairs[index]
        mask = self.masks[index].movedim(-1, 1).float()
        inside = torch.nn.functional.interpolate(mask, tuple(pair.target.shape[1:3]), mode="area").movedim(1, -1)
        weight = self.floor + (1 - self.floor) * inside.clamp(0, 1)
        return pair._replace(target=pair.target * weight + _GREY * (1 - weight))

    def target(self, index: int) -> torch.Tensor:
        return self[index].target

    def size(self, index: int) -> tuple[int, int]:
        return self.pairs.size(index)

    def digest(self) -> str:
        masks = [hashlib.sha256(mask.contiguous().numpy()).hexdigest() for mask in self.masks]
        return digest(self.pairs.digest(), masks, self.floor)


def choices() -> list[str]:
    """What `dataset_folder` offers: "none", and each folder in ComfyUI's input folder that has the three folders."""
    listed = set(folder_paths.get_input_subfolders())
    return [NONE, *(name for name in sorted(listed) if all(f"{name}/{role}" in listed for role in ROLES))]


def open_pairs(pictures: dict[str, Sequence[torch.Tensor] | None], dataset_folder: str) -> Pairs:
    """The folder's pairs, or those of the connected pictures. Raises FusionError, naming what is missing."""
    if dataset_folder != NONE:
        return _in_input_folder(dataset_folder)
    missing = [name for name in ROLES if not pictures.get(name)]
    if missing:
        raise FusionError(f"{', '.join(missing)}: nothing is connected. Connect pictures, or choose a dataset_folder")
    return ListedPairs(*(pictures[name] for name in ROLES))


def folder_digest(dataset_folder: str) -> str:
    """The digest of a folder's pairs as they are now, "" for "none". Raises FusionError as `open_pairs` does."""
    return "" if dataset_folder == NONE else _in_input_folder(dataset_folder).digest()


def _in_input_folder(name: str) -> FolderPairs:
    root = folder_paths.get_input_directory()
    path = os.path.join(root, name)
    if not folder_paths.is_within_directory(root, path):
        raise FusionError(f"dataset_folder {name!r} leaves the input folder: choose one of the list")
    return FolderPairs(Path(path))


def _views(batches: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
    """Each picture as [1, H, W, C], sharing the memory of its batch."""
    for batch in batches:
        check_pictures(batch, name, FusionError)
    views = [picture[None] for batch in batches for picture in batch]
    if not views:
        raise FusionError(f"{name} holds no picture: connect at least one")
    return views


def _files(folder: Path) -> dict[str, Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        fix = f"it needs the folders {', '.join(ROLES)}"
        raise FusionError(f"{folder} cannot be read ({error.strerror}): {fix}") from error
    files: dict[str, Path] = {}
    for path in entries:
        # macOS leaves files whose names begin with a dot.
        if path.suffix.lower() in _ENDINGS and path.is_file() and not path.name.startswith("."):
            # Systems and copying programs spell one name in several ways.
            other = files.setdefault(_name(path), path)
            if other is not path:
                raise FusionError(f"{folder} has {other.name} and {path.name}, of one name: remove or rename one")
    return files


def _name(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)


@contextlib.contextmanager
def _open_picture(path: Path) -> Iterator[Image.Image]:
    """The picture in a file. Raises FusionError, naming the file, for what PIL raises here and in the block."""
    try:
        image = Image.open(path)
    except _UNREADABLE as error:
        raise FusionError(f"{path} is not a readable picture ({error}): replace or remove the pair") from error
    try:
        with image:
            yield image
    except _UNREADABLE as error:
        raise FusionError(f"{path} is damaged ({error}): replace or remove the pair") from error


def _read(path: Path) -> torch.Tensor:
    with _open_picture(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # grey in 16 bits, which PIL would clip at 255
            upright = Image.fromarray((np.array(upright) / 257).round().astype(np.uint8))
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).float().div_(255).unsqueeze(0)
