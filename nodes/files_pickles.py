"""What torch.save's archives may look like, and how settings beside the weights are read past."""

import contextlib
import os
import struct
import zipfile

import torch

from .files_names import refused

# What a crafted archive can provoke in zipfile.
_UNZIPPING = (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error)


class _Settings:
    """What stands for an object of settings in reading: it holds them and does nothing."""


# Classes of settings in a Lightning checkpoint, by their names in it.
_SETTINGS = {
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning.pytorch.utilities.parsing.AttributeDict": dict,
    "lightning_fabric.utilities.data.AttributeDict": dict,
    "lightning.fabric.utilities.data.AttributeDict": dict,
    "argparse.Namespace": _Settings,
}


def check_archive(path: str | os.PathLike, descriptor: int, size: int, max_pickle: int, fix: str) -> None:
    """Refuse an archive of `size` bytes that unpacks to more, or whose pickles are over `max_pickle` bytes."""
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _UNZIPPING as error:
        raise refused(path, f"is no zip file of torch.save ({error})", fix) from error
    stored = sum(info.file_size for info in infos)
    pickled = sum(info.file_size for info in infos if info.filename.endswith(".pkl"))
    packed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
    if stored > size or pickled > max_pickle or packed:
        raise refused(path, "unpacks to more than its own size", fix)


def past_settings() -> contextlib.AbstractContextManager:
    """While it lasts, torch's weights-only unpickler takes Lightning's settings for these."""
    return torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _SETTINGS.items()])
