"""What model managers keep beside a file: a picture, and tags and author in JSON; only ever read.

Pictures: <name>.preview.png and <name>.png, or jpg, jpeg, webp, as ComfyUI's model browser, Stability Matrix and
A1111's descendants name them. JSON: <name>.metadata.json of Lora Manager, <name>.cm-info.json of Stability Matrix,
<name>.civitai.info of Civitai Helper.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..consent.record import shown

_PICTURES = [f"{middle}.{ending}" for middle in (".preview", "") for ending in ("png", "jpg", "jpeg", "webp")]
_FORMATS = ("PNG", "JPEG", "WEBP")
_NOTES = (".metadata.json", ".cm-info.json", ".civitai.info")
_LARGEST_NOTE = 4 << 20  # bytes
_LARGEST_PICTURE = 64 << 20  # bytes
_MOST_PIXELS = 64 << 20
_SIDE = 1024  # of what is shown
_MOST_TAGS = 20


def preview(path: Path) -> tuple[torch.Tensor | None, str]:
    """The picture beside a file, [1, H, W, 3] in 0..1 and at most 1024 pixels a side, or None and what is wrong."""
    for ending in _PICTURES:
        beside = path.with_suffix(ending)
        if not os.path.lexists(beside):
            continue
        if not _is_plain(beside, path.parent, _LARGEST_PICTURE):
            return None, f"{beside.name} is no plain file beside it, or is too large"
        try:
            return _read_picture(beside), ""
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return None, f"{beside.name} cannot be read: {shown(str(error))}"
    return None, "there is no preview picture beside it"


def tags_and_author(path: Path) -> tuple[tuple[str, ...], str]:
    """The tags and the author that a model manager wrote beside a file; empty where there are none."""
    for ending in _NOTES:
        beside = path.with_suffix(ending)
        if not os.path.lexists(beside) or not _is_plain(beside, path.parent, _LARGEST_NOTE):
            continue
        try:
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return _tags(content), _author(content)
    return (), ""


def _read_picture(path: Path) -> torch.Tensor:
    with Image.open(path, formats=_FORMATS) as picture:
        if picture.width * picture.height > _MOST_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels")
        picture.draft("RGB", (_SIDE, _SIDE))
        picture.thumbnail((_SIDE, _SIDE))
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


def _is_plain(path: Path, folder: Path, most: int) -> bool:
    """Whether it is a file of at most so many bytes, and no link that leads out of the folder."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    inside = folder_paths.is_within_directory(str(folder), str(path))
    return stat.S_ISREG(status.st_mode) and status.st_size <= most and inside


def _tags(content: dict[str, Any]) -> tuple[str, ...]:
    model = content.get("model")
    listed = content.get("tags") or content.get("Tags") or (isinstance(model, dict) and model.get("tags")) or ()
    if not isinstance(listed, list):
        return ()
    return tuple(shown(tag) for tag in listed[:_MOST_TAGS] if isinstance(tag, str) and tag.strip())


def _author(content: dict[str, Any]) -> str:
    nested = content.get("civitai")
    for source in (content, nested if isinstance(nested, dict) else {}):
        creator = source.get("creator")
        if isinstance(creator, dict) and isinstance(creator.get("username"), str):
            return shown(creator["username"])
    return ""
