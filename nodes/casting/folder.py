"""The files of a casting sheet in ComfyUI's output folder, and the contact sheet of them; apart, since files come and
go while the sheet stays.
"""

import contextlib
import functools
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import folder_paths
from PIL import Image, ImageOps

from .. import labels
from ..files.names import normalise_prefix
from .method import FILE_NAME, LONGEST_PREFIX, Item

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")
_VIDEOS = (".mp4", ".mov", ".webm", ".mkv")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# What PIL and PyAV raise for a file that is damaged or no picture.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, av.error.FFmpegError)
_THUMBNAIL, _SMALLEST = 96, 24  # pixels
_LARGEST = 6000  # pixels of the contact sheet's longer side, where thumbnails can be smaller for it
_LABEL, _LINE = 220, 16  # width of a row's label and height of a line, in pixels


def split_prefix(filename_prefix: str) -> tuple[str, str]:
    """Folder in the output folder, `` or ending in `/`, and the beginning of names, safe on every platform.

    Raises WeightFileError for one that leaves the output folder, and ValueError for a name that is too long.
    """
    folder, slash, name = normalise_prefix(filename_prefix).rpartition("/")
    if len(name.encode()) > LONGEST_PREFIX:
        raise ValueError(f"filename_prefix ends in {name[:40]!r}: use a name of at most {LONGEST_PREFIX} letters")
    return (folder + slash).replace("%", "_"), name.replace("%", "_")  # Save Image fills in what is between them


def present(folder: str) -> tuple[dict[str, Path], int]:
    """The newest complete file of each stem in a folder of the output folder, and how many files are damaged."""
    found: dict[str, Path] = {}
    damaged = 0
    try:
        entries = sorted(os.scandir(_root(folder)), key=lambda entry: entry.name)
    except OSError:  # nothing was saved yet
        return {}, 0
    for entry in entries:
        match = FILE_NAME.search(entry.name)
        if match is None or Path(entry.name).suffix.lower() not in (*_IMAGES, *_VIDEOS):
            continue
        with contextlib.suppress(OSError):  # deleted meanwhile
            status = entry.stat()
            if _is_complete(entry.path, status.st_mtime_ns, status.st_size):
                found[entry.name[: match.end()]] = Path(entry.path)
            else:
                damaged += 1
    return found, damaged


def _root(folder: str) -> Path:
    return Path(folder_paths.get_output_directory()) / folder


@functools.lru_cache(maxsize=1 << 16)
def _is_complete(path: str, _modified: int, size: int) -> bool:
    """Whether a file has its end, which one whose writer was killed lacks; where its kind does not tell, it has."""
    suffix = Path(path).suffix.lower()
    if not size:
        return False
    with open(path, "rb") as file:
        if suffix == ".webp":
            return file.read(4) == b"RIFF" and int.from_bytes(file.read(4), "little") + 8 <= size
        if suffix in (".mp4", ".mov"):
            return _has_index(file, size)
        ending = {".png": _PNG_END, ".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".gif": b";"}.get(suffix, b"")
        file.seek(max(0, size - len(ending)))
        return file.read() == ending if ending else True


def _has_index(file, size: int) -> bool:
    """Whether an MP4's boxes end where the file ends, and its index is among them."""
    place, kinds = 0, set()
    while place + 8 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:  # 64 bits follow
            length = int.from_bytes(file.read(8), "big")
        elif length == 0:  # up to the end of the file
            length = size - place
        kinds.add(kind)
        if length < 8:
            return False
        place += length
    return place == size and b"moov" in kinds


# The contact sheet


def write_contact_sheet(folder: str, name: str, every: Sequence[Item], files: Mapping[str, Path]) -> str:
    """Write `<name>_contact_sheet.jpg` in place of an earlier one; returns its name. Raises OSError."""
    root = _root(folder)
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".understudy-{secrets.token_hex(8)}.tmp"
    target = root / f"{name}_contact_sheet.jpg"
    try:
        contact_sheet(every, files).save(temporary, "JPEG", quality=90)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target.name


def contact_sheet(every: Sequence[Item], files: Mapping[str, Path]) -> Image.Image:
    """The files' first frames: a column for each action, a row for each identity, scene and seed, with their labels.

    What is not there is grey.
    """
    columns = list(dict.fromkeys(item.action for item in every))
    rows = list(dict.fromkeys((item.identity, item.scene, item.seed) for item in every))
    identities = list(dict.fromkeys(item.identity for item in every))
    side = min(_THUMBNAIL, (_LARGEST - _LABEL) // len(columns), (_LARGEST - _LINE) // len(rows))
    side = max(side, _SMALLEST)
    image, draw = labels.canvas(_LABEL + side * len(columns), _LINE + side * len(rows))
    for i, action in enumerate(columns):
        labels.draw_text(draw, (_LABEL + i * side + 2, 1), f"{i + 1} {action}", side - 4)
    for i, (identity, scene, seed) in enumerate(rows):
        number = identities.index(identity) + 1  # where no font here has the letters, it tells them apart
        for j, line in enumerate((f"{number} {identity}", scene, f"seed {seed}")[: max(1, side // _LINE)]):
            labels.draw_text(draw, (2, _LINE + i * side + j * _LINE), line, _LABEL - 4)
    for item in every:
        left = _LABEL + columns.index(item.action) * side
        top = _LINE + rows.index((item.identity, item.scene, item.seed)) * side
        picture = _picture(files.get(item.stem))
        if picture is None:
            draw.rectangle((left + 1, top + 1, left + side - 2, top + side - 2), fill="#dddddd")
        else:
            picture = ImageOps.contain(picture, (side - 2, side - 2))
            image.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    return image


def _picture(path: Path | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        status = path.stat()
        return _thumbnail(str(path), status.st_mtime_ns, status.st_size)
    except _UNREADABLE:
        return None


@functools.lru_cache(maxsize=4096)
def _thumbnail(path: str, _modified: int, _size: int) -> Image.Image:
    """A picture's or a video's first frame, read once for each time that it was written."""
    if Path(path).suffix.lower() in _VIDEOS:
        with av.open(path) as container:
            frame = next(container.decode(video=0)).to_image()
    else:
        with Image.open(path) as opened:
            opened.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            frame = ImageOps.exif_transpose(opened).convert("RGB")
    frame.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return frame
