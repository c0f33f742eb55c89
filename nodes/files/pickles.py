"""Weights in pickles, as official checkpoints and embeddings still have them, read without running code in them."""

import contextlib
import os
import struct
import zipfile
from pickle import UnpicklingError

import torch

from .names import refused
from .weights import MAX_FILE, MAX_HEADER, read, regular_file

ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

_FIX = "Convert it to safetensors, or download the official file again"
# What a crafted archive can provoke in zipfile, and a crafted stream in torch's unpickler.
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error)
_UNPICKLING_ERRORS = (UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError,
                      AssertionError, ArithmeticError, MemoryError, OSError)


class _InertNamespace:
    """Replaces an object that holds settings; it does nothing."""


# The classes of settings in a Lightning checkpoint, by their names in it.
_LIGHTNING_SETTINGS = {
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning.pytorch.utilities.parsing.AttributeDict": dict,
    "lightning_fabric.utilities.data.AttributeDict": dict,
    "lightning.fabric.utilities.data.AttributeDict": dict,
    "argparse.Namespace": _InertNamespace,
}


def read_pickle(
    path: str | os.PathLike, *, max_file: int = MAX_FILE, under: str = "state_dict", lightning_settings: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of an official .ckpt or .pt file, from its dictionary `under` if it has one. Runs no code from it.

    `lightning_settings` allows, and ignores, the settings that Lightning stores beside the weights.

    Only torch's zip format without compression is accepted, through `torch.load(weights_only=True)`.
    Raises WeightFileError for anything else.
    """
    with regular_file(path, max_file) as (descriptor, size):
        _check_archive(path, descriptor, size)
    try:
        with _allow_lightning_settings() if lightning_settings else contextlib.nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        # Without torch's message, which advises loading the file anyway.
        raise refused(path, "is damaged or holds more than weights", _FIX) from error
    if isinstance(content, dict) and isinstance(content.get(under), dict):
        content = content[under]
    tensors = {}
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise refused(path, f"holds no tensors at its top level or under `{under}`", _FIX)
    for key, tensor in tensors.items():
        # A zero stride makes a few bytes pose as terabytes.
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise refused(path, f"gives {key!r} more elements than it stores", _FIX)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def read_any(
    path: str | os.PathLike, *, under: str = "state_dict", lightning_settings: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file or, by its ending, of a pickle, which has no metadata.

    Raises WeightFileError as `read` and `read_pickle` do; the options are those of `read_pickle`.
    """
    if os.path.splitext(path)[1].lower() in ENDINGS:
        return read_pickle(path, under=under, lightning_settings=lightning_settings), {}
    return read(path)


def _check_archive(path: str | os.PathLike, descriptor: int, size: int) -> None:
    """Refuse an archive of `size` bytes that unpacks to more, or whose pickles are over MAX_HEADER bytes."""
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        raise refused(path, f"is not a zip file of torch.save ({error})", _FIX) from error
    stored = sum(info.file_size for info in infos)
    pickled = sum(info.file_size for info in infos if info.filename.endswith(".pkl"))
    compressed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
    if stored > size or pickled > MAX_HEADER or compressed:
        raise refused(path, "unpacks to more than its own size", _FIX)


def _allow_lightning_settings() -> contextlib.AbstractContextManager:
    """A context in which torch's weights-only unpickler reads Lightning's settings as inert objects."""
    return torch.serialization.safe_globals(
        [(replacement, name) for name, replacement in _LIGHTNING_SETTINGS.items()]
    )
