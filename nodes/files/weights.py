"""The only reads and writes of safetensors files.

Reading trusts nothing: size and header are bounded, and `safetensors.safe_open` checks every offset before a
tensor is touched. Writing is atomic and never overwrites (`publishing`).
"""

import contextlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from .names import normalise_prefix, refused
from .publishing import save_content

MAX_HEADER = 8 << 20  # bytes; a 14-billion-parameter model's header is under one tenth of it
MAX_ENTRIES = 300_000  # objects, lists and keys in a header, which bounds the memory of parsing it
MAX_FILE = 64 << 30  # bytes; a checkpoint of training the whole UNet of SDXL is 29 GiB
MAX_RANK = 8

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}

_DAMAGED = "Download or save the file again: it is damaged, or was not written by a safetensors library"


# Reading


def inspect(
    path: str | os.PathLike, *, max_header: int = MAX_HEADER, max_file: int = MAX_FILE
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by key, and metadata, of a safetensors file, in bounded time and memory, without reading tensors.

    Raises WeightFileError: not a regular file, truncated, trailing bytes, overlaps or holes, a header over
    `max_header` bytes, a file over `max_file` bytes, duplicate keys, unknown dtypes, no elements.
    """
    header = _read_header(path, max_header, max_file)
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise refused(path, f"is not a valid safetensors file ({error})", _DAMAGED) from error
    try:
        # Of two equal keys safe_open takes the last; other readers may take the first.
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise refused(path, f"has an ambiguous header ({error})", _DAMAGED) from error
    metadata = entries.pop("__metadata__", None) or {}
    if not entries:
        raise refused(path, "holds no tensors", "Choose a file with trained weights")
    for key, entry in entries.items():
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise refused(path, f"describes {key!r} by {str(sorted(entry))[:60]}", _DAMAGED)
        if entry["dtype"] not in DTYPES:
            fix = f"Convert it to one of {', '.join(DTYPES)}"
            raise refused(path, f"stores {key!r} as {entry['dtype']}", fix)
        if len(entry["shape"]) > MAX_RANK or math.prod(entry["shape"]) == 0:
            raise refused(path, f"gives {key!r} the shape {str(entry['shape'])[:60]}", _DAMAGED)
    return {key: tuple(entry["shape"]) for key, entry in entries.items()}, metadata


def validate(path: str | os.PathLike, *, max_header: int = MAX_HEADER, max_file: int = MAX_FILE) -> None:
    """Refuse whatever is not a valid safetensors file, as `inspect` does."""
    inspect(path, max_header=max_header, max_file=max_file)


def read(
    path: str | os.PathLike, *, max_header: int = MAX_HEADER, max_file: int = MAX_FILE
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (on the CPU, copied, as stored) and metadata of a safetensors file; `inspect` comes first.

    Raises WeightFileError as `inspect` does.
    """
    _, metadata = inspect(path, max_header=max_header, max_file=max_file)
    tensors = {}
    with safetensors.safe_open(path, framework="pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            if tensor.dtype == torch.bool and tensor.view(torch.uint8).max() > 1:
                raise refused(path, f"stores values other than 0 and 1 in the boolean {key!r}", _DAMAGED)
            # Cloned, since truncating the mapped file later would kill the process.
            tensors[key] = tensor.clone()
    return tensors, metadata


def _read_header(path: str | os.PathLike, max_header: int, max_file: int) -> bytes:
    """The header's bytes, once its length fits the file and the limits."""
    with regular_file(path, max_file) as (descriptor, size):
        prefix = os.read(descriptor, 8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise refused(path, f"is truncated at {size} bytes", _DAMAGED)
        if length > max_header:
            raise refused(path, f"has a header of {length} bytes, over the {max_header} allowed", _DAMAGED)
        header = b""
        while len(header) < length and (chunk := os.read(descriptor, length - len(header))):
            header += chunk
    if sum(header.count(mark) for mark in (b"{", b"[", b":")) > MAX_ENTRIES:
        raise refused(path, f"has over {MAX_ENTRIES} header entries", _DAMAGED)
    return header


@contextlib.contextmanager
def regular_file(path: str | os.PathLike, max_file: int) -> Iterator[tuple[int, int]]:
    """An open descriptor and the size in bytes; devices, pipes and folders are refused without waiting."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, flags)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refused(path, "is not a regular file", "Choose a weight file, not a folder, device or pipe")
            if status.st_size > max_file:
                fix = f"Split it, or store it in fewer bits: at most {max_file} bytes are read"
                raise refused(path, f"has {status.st_size} bytes", fix)
            yield descriptor, status.st_size
        except OSError as error:
            raise refused(path, f"cannot be read ({error})", "Check the name and the permissions") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key appears twice")
    return entries


# Writing


def save(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], folder: str, filename_prefix: str) -> Path:
    """Write `output/<folder>/<prefix>_00001_.safetensors`, with the next free number; returns its path.

    `folder` is the name of a WeightFolder (`loras`, `action_identifiers`, ...), which then lists it.
    Nothing is ever overwritten, and after a crash there is a complete file or none. Shared, strided and
    device tensors are stored by value. Raises WeightFileError for names that point outside, no tensors, NaN or
    infinite values, metadata that is not text; OSError, leaving nothing behind, when the disk fails or is full.
    """
    prefix = normalise_prefix(filename_prefix).removeprefix(f"{folder}/")
    metadata = _checked_metadata(metadata, prefix)
    content = safetensors.torch.save(_storable(tensors, prefix), metadata=metadata)
    return save_content(content, folder, prefix, validate)


def _checked_metadata(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    for key, value in metadata.items():
        try:
            (key + value).encode()
        except (TypeError, UnicodeEncodeError) as error:
            fix = "Pass text; json.dumps turns other values into it"
            raise refused(name, f"has metadata {key!r} that is not text", fix) from error
    return dict(metadata)


def _storable(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Dense, contiguous CPU tensors, none sharing memory with another; refuses what could not be used again."""
    if not tensors:
        raise refused(name, "has no tensors to save", "Connect trained weights")
    stored, storages = {}, set()
    for key, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_meta or tensor.dtype not in DTYPES.values():
            kind = f"{tensor.layout} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else ""
            problem = f"has {key!r} as {type(tensor).__name__} {kind}"
            raise refused(name, problem, "Save dense tensors in fp32, fp16, bf16, fp8 or whole numbers")
        if tensor.numel() == 0:
            raise refused(name, f"has no element in {key!r}", "Leave the tensor out")
        # fp8 has no isfinite; fp16 holds every value of both fp8 types.
        narrow = tensor.dtype.itemsize == 1 and tensor.is_floating_point()
        if not torch.isfinite(tensor.to(torch.float16) if narrow else tensor).all():
            fix = "Train again with a lower learning rate or in fp32"
            raise refused(name, f"has NaN or infinite values in {key!r}", f"{fix}; nothing was written")
        dense = tensor.detach().to("cpu").contiguous()
        if dense.untyped_storage().data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        stored[key] = dense
    return stored
