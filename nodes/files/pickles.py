"""Weights in pickles, as official checkpoints and embeddings still have them, read without running code in them."""

import io
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from .names import WeightFileError, refused
from .unpickling import MAX_STEPS, Storage, StoredTensor, Unknown, UnsafePickleError, load
from .weights import MAX_FILE, MAX_HEADER, MAX_RANK, read, regular_file

ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

_FIX = "Convert it to safetensors, or download the official file again"
_UNSAFE = "Do not load it elsewhere either; get the weights as safetensors from a source that you trust"
# What a crafted archive can provoke in zipfile, and a crafted pickle in its reader.
_ERRORS = (zipfile.BadZipFile, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
           ArithmeticError, MemoryError, OSError, struct.error)
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before PyTorch 1.6
_MOST_SHARING = 8  # tensors may share storage, as tied layers do; together they name at most so many times its bytes

_ReadStorage = Callable[[Storage], torch.Tensor]  # its bytes [N]


def read_pickle(
    path: str | os.PathLike, *, max_file: int = MAX_FILE, under: str = "state_dict"
) -> dict[str, torch.Tensor]:
    """Tensors of a file of torch.save, from its dictionary `under` if it has one. Runs no code from it.

    What else is in it, such as a training script's settings, is left out, whatever its classes are. Of a list of
    dictionaries, as some embeddings are, the keys begin with `0.`, `1.`, … . Zip files without compression are read,
    and those of PyTorch before 1.6. Raises WeightFileError for anything else, naming the class or function if it
    could run code.
    """
    with regular_file(path, max_file) as (descriptor, size), _BoundedFile(os.dup(descriptor)) as file:
        try:
            content, read_storage = _open(path, file, size)
            stored = _tensors(path, content, under)
            total = sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in stored.values())
            if total > _MOST_SHARING * size:
                raise refused(path, f"names {total} bytes of weights and has {size}", _FIX)
            storages: dict[str, torch.Tensor] = {}
            return {key: _tensor(path, key, tensor, storages, read_storage) for key, tensor in stored.items()}
        except WeightFileError:
            raise
        except UnsafePickleError as error:
            problem = f"holds more than weights: it asks for {str(error)[:100]!r}, which could run code (and was not)"
            raise refused(path, problem, _UNSAFE) from error
        except _ERRORS as error:
            raise refused(path, f"is damaged, or is not a file of torch.save ({str(error)[:100]})", _FIX) from error


def read_any(
    path: str | os.PathLike, *, under: str = "state_dict"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file or, by its ending, of a pickle, which has no metadata.

    A safetensors file under a pickle's ending is read as what it is. Raises WeightFileError as `read` and
    `read_pickle` do; `under` is that of `read_pickle`.
    """
    if os.path.splitext(path)[1].lower() in ENDINGS:
        with regular_file(path, MAX_FILE) as (descriptor, _):
            start = os.read(descriptor, 9)
        if start[8:] != b"{":
            return read_pickle(path, under=under), {}
    return read(path)


def _open(path: str | os.PathLike, file: BinaryIO, size: int) -> tuple[Any, _ReadStorage]:
    """The file's content, and what reads one of its storages."""
    start = file.read(2)
    file.seek(0)
    return _open_archive(path, file, size) if start == b"PK" else _open_legacy(file, size)


def _open_archive(path: str | os.PathLike, file: BinaryIO, size: int) -> tuple[Any, _ReadStorage]:
    """Refuses an archive of `size` bytes that unpacks to more, or whose pickles are over MAX_HEADER bytes."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    stored = sum(info.file_size for info in entries.values())
    pickled = sum(info.file_size for name, info in entries.items() if name.endswith(".pkl"))
    if stored > size or pickled > MAX_HEADER or any(i.compress_type != zipfile.ZIP_STORED for i in entries.values()):
        raise refused(path, "unpacks to more than its own size", _FIX)
    (pickle,) = (name for name in entries if name == "data.pkl" or name.endswith("/data.pkl"))
    folder = pickle.removesuffix("data.pkl")

    def content_of(name: str, count: int) -> torch.Tensor:
        info = entries[f"{folder}{name}"]
        file.seek(info.header_offset)
        header = file.read(30)
        if info.file_size != count or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{name} has {info.file_size} bytes, where {count} are expected")
        file.seek(sum(struct.unpack("<HH", header[26:])), io.SEEK_CUR)
        return _read_bytes(file, count, size)

    byteorder = entries.get(f"{folder}byteorder")
    if byteorder and content_of("byteorder", byteorder.file_size).numpy().tobytes() != sys.byteorder.encode():
        raise ValueError("its numbers are in another machine's byte order")
    content, _ = load(io.BytesIO(content_of("data.pkl", entries[pickle].file_size).numpy().tobytes()))
    return content, lambda storage: content_of(f"data/{storage.key}", storage.count * storage.dtype.itemsize)


def _open_legacy(file: BinaryIO, size: int) -> tuple[Any, _ReadStorage]:
    """Five pickles, then each storage behind the number of its elements."""
    pickles = io.BytesIO(file.read(MAX_HEADER))
    (magic, _), (protocol, _), (machine, _), (content, storages), (keys, _) = (load(pickles) for _ in range(5))
    if magic != _MAGIC or protocol != _PROTOCOL or machine.get("little_endian") != (sys.byteorder == "little"):
        raise ValueError("it is a plain pickle")
    places, place = {}, pickles.tell()
    for key in keys:
        places[key] = place + 8
        place += 8 + storages[key].count * storages[key].dtype.itemsize

    def read_storage(storage: Storage) -> torch.Tensor:
        file.seek(places[storage.key] - 8)
        (count,) = struct.unpack("<q", file.read(8))
        if count != storage.count:
            raise ValueError(f"storage {storage.key} has {count} elements, where {storage.count} are expected")
        return _read_bytes(file, count * storage.dtype.itemsize, size)

    return content, read_storage


class _BoundedFile(io.FileIO):
    """Unbuffered; it reads no more at once than a pickle may have, since a zip file states its directory's size."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_HEADER:
            raise zipfile.BadZipFile(f"{size} bytes are to be read at once")
        return super().read(size)


def _read_bytes(file: BinaryIO, count: int, size: int) -> torch.Tensor:
    if not 0 <= count <= size - file.tell():
        raise ValueError("it is truncated")
    content = torch.empty(count, dtype=torch.uint8)
    rest = memoryview(content.numpy())
    while len(rest):  # a system reads 2 GiB at most at once
        done = file.readinto(rest)
        if not done:
            raise ValueError("it is truncated")
        rest = rest[done:]
    return content


def _tensors(path: str | os.PathLike, content: Any, under: str) -> dict[str, StoredTensor]:
    """The tensors of the content's dictionary, or of that `under` it, by key."""
    entries = _entries(content)
    entries = _entries(entries[under]) or entries if under in entries else entries
    for key, value in entries.items():
        if isinstance(value, Unknown) and value.path.startswith("torch._utils."):
            raise refused(path, f"has {str(key)[:60]!r} as a tensor of {value.path}", "Save it as a dense tensor")
    tensors = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
    if not tensors:
        kind = content.path if isinstance(content, Unknown) else type(content).__name__
        raise refused(path, f"is a {kind} without tensors at its top level or under `{under}`", _FIX)
    return tensors


def _entries(content: Any) -> dict[Any, Any]:
    """A dictionary's items, a module's parameters, or those of a list of dictionaries."""
    if isinstance(content, Unknown) and isinstance(content.state, dict):
        parameters = content.state.get("_parameters")
        return parameters if isinstance(parameters, dict) else content
    if isinstance(content, list):
        if sum(len(part) for part in content if isinstance(part, dict)) > MAX_STEPS:
            raise ValueError("it lists too many items")
        return {f"{i}.{key}": value for i, part in enumerate(content) if isinstance(part, dict)
                for key, value in part.items()}
    return content if isinstance(content, dict) else {}


def _tensor(
    path: str | os.PathLike, key: str, stored: StoredTensor, storages: dict[str, torch.Tensor],
    read_storage: _ReadStorage,
) -> torch.Tensor:
    """A view of its storage, which is read once for all its tensors."""
    storage, numbers = stored.storage, (stored.offset, *stored.shape, *stored.strides)
    if len(stored.shape) != len(stored.strides) or len(stored.shape) > MAX_RANK or not all(
        type(number) is int and number >= 0 for number in numbers
    ):
        raise ValueError(f"{key[:60]!r} has no valid shape")
    count = storage.count * storage.dtype.itemsize // stored.dtype.itemsize
    last = stored.offset + sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True))
    elements = math.prod(stored.shape)
    # A zero stride makes a few bytes pose as terabytes.
    if elements > count or (elements and last >= count):
        raise refused(path, f"gives {key[:60]!r} more elements than it stores", _FIX)
    if storage.key not in storages:
        storages[storage.key] = read_storage(storage)
    numbers = storages[storage.key][: count * stored.dtype.itemsize].view(stored.dtype)
    return numbers.as_strided(stored.shape, stored.strides, stored.offset)
