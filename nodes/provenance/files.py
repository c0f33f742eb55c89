"""Labelled pictures and videos as bytes, the same metadata as ComfyUI's own Save nodes give them, and reading it."""

from __future__ import annotations

import io
import json
import mimetypes
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import Types
from PIL import Image, PngImagePlugin

from ..files.publishing import said
from . import xmp

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXTENSIONS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "video/mp4": ".mp4"}
QUALITY = 95  # of JPEG and WebP

_PNG_PACKET = "XML:com.adobe.xmp"
_EXIF_MAKE, _EXIF_MODEL = 0x010F, 0x0110  # where ComfyUI's window looks for a workflow in WebP
_MAX_JPEG = 65_000  # bytes of EXIF or XMP in a JPEG's one segment of 65,533, less their headers
_COMPRESSION = 4  # zlib's level, as Save Image has it
# The description box of every C2PA manifest store: its type, and the label's bit.
_MANIFEST = b"jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71"
_MEDIA = ("image", "video", "audio")


def encode_picture(picture: torch.Tensor, media_type: str, chunks: Mapping[str, Any], packet: bytes) -> bytes:
    """The picture, [H, W, 1, 3 or 4] in 0..1, with an XMP packet, and ComfyUI's metadata as the Save nodes write it.

    Raises ValueError where the metadata does not fit into the format.
    """
    levels = (picture.detach().float().cpu() * 255).clamp(0, 255).byte().numpy()
    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    content = io.BytesIO()
    if media_type == "image/png":
        info = PngImagePlugin.PngInfo()
        for key, value in chunks.items():
            info.add_text(key, json.dumps(value))
        info.add_itxt(_PNG_PACKET, packet.decode())
        image.save(content, "PNG", pnginfo=info, compress_level=_COMPRESSION)
        return content.getvalue()
    exif = image.getexif()
    for key, value in chunks.items():
        tag = _EXIF_MODEL if key == "prompt" else _EXIF_MAKE - sum(tag <= _EXIF_MAKE for tag in exif)
        exif[tag] = f"{key}:{json.dumps(value)}"
    if media_type == "image/jpeg":
        for what, size in (("the workflow", len(exif.tobytes())), ("the label", len(packet))):
            if size > _MAX_JPEG:
                raise ValueError(f"{what} has {size} bytes, over the {_MAX_JPEG} that a JPEG holds: use png or webp")
        image.convert("RGB").save(content, "JPEG", quality=QUALITY, exif=exif, xmp=packet)
    else:
        image.save(content, "WEBP", quality=QUALITY, exif=exif, xmp=packet)
    return content.getvalue()


def encode_video(video: Any, metadata: Mapping[str, Any], packet: bytes) -> bytes:
    """A VIDEO as MP4 with ComfyUI's metadata as Save Video writes it, and an XMP packet."""
    temporary = folder_paths.get_temp_directory()
    with said("the video", temporary), tempfile.TemporaryDirectory(dir=temporary) as folder:
        path = os.path.join(folder, "video.mp4")
        video.save_to(path, format=Types.VideoContainer.MP4, codec=Types.VideoCodec.AUTO, metadata=metadata or None)
        content = Path(path).read_bytes()
    # At the end, so that no offset in the file moves.
    return content + struct.pack(">I4s", 8 + len(xmp.BOX) + len(packet), b"uuid") + xmp.BOX + packet


def media_type(name: str | os.PathLike) -> str:
    """The media type that the name stands for, if it is a picture, a video or a sound; else empty."""
    kind = mimetypes.guess_type(os.fspath(name), strict=False)[0] or ""
    return kind if kind.split("/")[0] in _MEDIA else ""


def content_type(path: str | os.PathLike) -> str:
    """The media type of a picture by its content, whatever it is called; of other files by name."""
    try:
        with Image.open(path) as image:
            return image.get_format_mimetype() or media_type(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return media_type(path)


def find_media(name: str) -> Path | None:
    """The file that a Load node means by this name, of ComfyUI's input, output and temporary folders, or None."""
    base = folder_paths.annotated_filepath(name)[0]
    if not base.strip() or "\n" in name or not media_type(base) or not folder_paths.exists_annotated_filepath(name):
        return None
    return Path(folder_paths.get_annotated_filepath(name))


def listed() -> list[str]:
    """Pictures and videos of ComfyUI's input folder, and of its output folder with all below, as find_media reads."""
    entries = os.scandir(folder_paths.get_input_directory())
    names = sorted(each.name for each in entries if each.is_file() and _is_shown(each.name))
    output = folder_paths.get_output_directory()
    for folder, folders, found in os.walk(output):
        folders.sort()
        parent = os.path.relpath(folder, output)
        names += [
            f"{os.path.normpath(os.path.join(parent, name))} [output]" for name in sorted(found) if _is_shown(name)
        ]
    return names


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and media_type(name).startswith(("image/", "video/"))


def find_learned(name: str) -> Iterator[tuple[str, Path]]:
    """(folder's name, path) of each model file of this name that ComfyUI lists."""
    if "\n" in name or "." not in name:
        return
    seen = set()
    for folder, (_, extensions) in list(folder_paths.folder_names_and_paths.items()):
        if os.path.splitext(name)[1].lower() in extensions and (path := folder_paths.get_full_path(folder, name)):
            if os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                yield folder, Path(path)


def has_manifest(path: str | os.PathLike) -> bool:
    """Whether the file holds a C2PA manifest store, valid or not."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(_MANIFEST) >= 0


def source_type(path: str | os.PathLike) -> str:
    """The digital source type in the file's XMP metadata, as xmp.source_type gives it.

    Raises ValueError for a damaged file, and what xmp.source_type raises.
    """
    kind = content_type(path)
    if kind.startswith("image/"):
        packet = _picture_packet(path)
    else:
        packet = _video_packet(path) if kind.startswith("video/") else b""
    return xmp.source_type(packet) if packet else ""


def _picture_packet(path: str | os.PathLike) -> bytes:
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.load()  # its texts may be behind the pixels
            packet = image.info.get("xmp") or image.info.get(_PNG_PACKET) or b""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read as a picture ({error})") from error
    return packet.encode() if isinstance(packet, str) else packet


def _video_packet(path: str | os.PathLike) -> bytes:
    """The XMP packet of an MP4 file: a box at its top level."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        place = 0
        if file.read(8)[4:] != b"ftyp":
            return b""
        while place + 8 <= end:
            file.seek(place)
            size, kind = struct.unpack(">I4s", file.read(8))
            header = 8
            if size == 1:
                size, header = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0], 16
            size = size or end - place
            if size < header or place + size > end:
                raise ValueError(f"it is damaged: a part at {place} has {size} bytes of {end}")
            if kind == b"uuid" and file.read(16) == xmp.BOX:
                return file.read(min(size - header - 16, xmp.MAX_PACKET + 1))
            place += size
    return b""
