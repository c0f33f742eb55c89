"""The only reads and writes of the pack's weight files, and the folders it shares with the host.

Reading trusts nothing: size and header are bounded, `safetensors.safe_open` checks every offset, and only
then is a tensor touched. Writing is atomic: a temporary file in the same folder, fsync, a link that cannot
overwrite.
"""

import contextlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import folder_paths
import safetensors
import safetensors.torch
import torch

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted: the sweep needs no lock there
    fcntl = None

from .files_names import WeightFileError as WeightFileError
from .files_names import normalise_prefix, refused
from .files_pickles import check_archive, past_settings

PACK_ROOT = Path(__file__).resolve().parent.parent
ACTION_IDENTIFIERS, FUSION_EMBEDDINGS = "action_identifiers", "fusion_embeddings"
TRAINING_CHECKPOINTS = "training_checkpoints"
EXTENSION = ".safetensors"

# The theatre's own files, by the host's list that shows them and the folder of `workflows/models` they lie in.
THEATRE_FILES = {
    "checkpoints": ("puppets_sd.safetensors",),
    "diffusion_models": ("puppets_wan.safetensors",),
    "vae": ("puppets_wan_vae.safetensors",),
    "loras": ("puppets_sd_identity.safetensors", "puppets_wan_identity.safetensors"),
    FUSION_EMBEDDINGS: ("puppets_fusion.safetensors",),
    ACTION_IDENTIFIERS: ("puppets_flexing.safetensors",),
}

MAX_HEADER = 8 << 20  # bytes; a 14-billion-parameter model's header is under one tenth of it
MAX_ENTRIES = 300_000  # objects, lists and keys in a header: what bounds the memory of parsing it
MAX_FILE = 64 << 30  # bytes; a checkpoint of training the whole UNet of SDXL is 29 GiB
MAX_RANK = 8

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}

_DAMAGED = "Download or save the file again: it is damaged, or no safetensors library wrote it"
# What a crafted stream can provoke in torch's unpickler.
_UNPICKLING = (UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError,
               AssertionError, ArithmeticError, MemoryError, OSError)
_TEMPORARY = ".understudy-"


# Reading


def validate(path: str | os.PathLike, *, max_header: int = MAX_HEADER, max_file: int = MAX_FILE) -> None:
    """Refuse what is no sound safetensors file, in bounded time and memory and without reading tensors.

    Raises WeightFileError: no regular file, truncated, trailing bytes, overlaps or holes, a header over
    `max_header` bytes, a file over `max_file` bytes, duplicate keys, unknown dtypes, no elements.
    """
    header = _read_header(path, max_header, max_file)
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise refused(path, f"is no sound safetensors file ({error})", _DAMAGED) from error
    try:
        # safe_open lets the last of two equal keys win; other readers may take the first.
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise refused(path, f"has an ambiguous header ({error})", _DAMAGED) from error
    entries.pop("__metadata__", None)
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


def read(
    path: str | os.PathLike, *, max_header: int = MAX_HEADER, max_file: int = MAX_FILE
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (CPU, own memory, as stored) and metadata of a safetensors file; `validate` comes first.

    Raises WeightFileError as `validate` does.
    """
    validate(path, max_header=max_header, max_file=max_file)
    tensors = {}
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():
            tensor = file.get_tensor(key)
            if tensor.dtype == torch.bool and tensor.view(torch.uint8).max() > 1:
                raise refused(path, f"stores values other than 0 and 1 in the boolean {key!r}", _DAMAGED)
            # Cloned, since a mapped file that someone truncates later would kill the process.
            tensors[key] = tensor.clone()
    return tensors, metadata


def read_pickle(
    path: str | os.PathLike, *, max_file: int = MAX_FILE, under: str = "state_dict", without_settings: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of an official .ckpt or .pt file, those in its dictionary `under` if it has one; runs no code in it.

    `without_settings` reads past the settings that Lightning keeps beside the weights.

    Only torch's zip format without compression is taken, through `torch.load(weights_only=True)`.
    Raises WeightFileError for anything else.
    """
    fix = "Convert it to safetensors, or download the official file again"
    with _regular_file(path, max_file) as (descriptor, size):
        check_archive(path, descriptor, size, MAX_HEADER, fix)
    try:
        with past_settings() if without_settings else contextlib.nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        # Without torch's own words: they advise to load the file all the same.
        raise refused(path, "is damaged or holds more than weights", fix) from error
    if isinstance(content, dict) and isinstance(content.get(under), dict):
        content = content[under]
    tensors = {}
    if isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise refused(path, f"holds no tensors under its top level or `{under}`", fix)
    for key, tensor in tensors.items():
        # A zero stride makes a few bytes pose as terabytes.
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise refused(path, f"gives {key!r} more elements than it stores", fix)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _read_header(path: str | os.PathLike, max_header: int, max_file: int) -> bytes:
    """The header's bytes, once its length fits the file and the limits."""
    with _regular_file(path, max_file) as (descriptor, size):
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
def _regular_file(path: str | os.PathLike, max_file: int) -> Iterator[tuple[int, int]]:
    """An open descriptor and the size in bytes; devices, pipes and folders are refused without waiting."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, flags)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refused(path, "is no regular file", "Choose a weight file, no folder, device or pipe")
            if status.st_size > max_file:
                fix = f"Split it, or store it in fewer bits: at most {max_file} bytes are read"
                raise refused(path, f"has {status.st_size} bytes", fix)
            yield descriptor, status.st_size
        except OSError as error:
            raise refused(path, f"cannot be read ({error})", "Check the name and the permissions") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands there twice")
    return entries


# Writing


def save(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], folder: str, filename_prefix: str
) -> Path:
    """Write `output/<folder>/<prefix>_00001_.safetensors`, with the next free number; returns its path.

    `folder` is a key of the host's loaders (`loras`, `action_identifiers`, ...), which then lists it.
    Nothing is ever overwritten, and after a crash there is a whole file or none. Shared, strided and
    device tensors are stored by value. Raises WeightFileError for names that lead outside, no tensors, NaN or
    infinite values, metadata that is no text; OSError, leaving nothing behind, when the disk does not do.
    """
    prefix = normalise_prefix(filename_prefix).removeprefix(f"{folder}/")
    metadata = _checked_metadata(metadata, prefix)
    content = safetensors.torch.save(_storable(tensors, prefix), metadata=metadata)
    output = folder_paths.get_output_directory()
    root = os.path.join(output, folder)
    try:
        if not folder_paths.is_within_directory(output, os.path.dirname(os.path.join(root, prefix))):
            raise refused(filename_prefix, "leaves the output folder through a link", "Use another subfolder")
        target, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
        _sweep(target)
        return _publish(content, Path(target), name, counter)
    except OSError as error:
        fix = "Free some space or choose another folder, then run the node again; nothing was written"
        problem = f"{prefix!r} could not be saved in {root!r}: {error.strerror}"
        raise OSError(error.errno, f"{problem}. {fix}") from error


def _checked_metadata(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    for key, value in metadata.items():
        try:
            (key + value).encode()
        except (TypeError, UnicodeEncodeError) as error:
            fix = "Pass text; json.dumps turns other values into it"
            raise refused(name, f"has metadata {key!r} that is no text", fix) from error
    return dict(metadata)


def _storable(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Dense, contiguous CPU tensors, none sharing memory with another; refuses what is not worth keeping."""
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
        # fp8 has no isfinite of its own; fp16 holds every value of both kinds.
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


def _publish(content: bytes, folder: Path, name: str, counter: int) -> Path:
    temporary, descriptor = _open_temporary(folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            validate(temporary)  # what could not be read again is never published
            if os.name != "nt":  # linked while open, so that the lock still keeps the sweep away
                return _link_next(temporary, folder, name, counter)
        return _link_next(temporary, folder, name, counter)
    finally:
        temporary.unlink(missing_ok=True)


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """A new file in `folder`, locked for as long as this process has it open."""
    while True:
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
        if _lock(descriptor) and os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)  # another process swept it between its creation and the lock
            continue
        return temporary, descriptor


def _link_next(temporary: Path, folder: Path, name: str, counter: int) -> Path:
    """Give the temporary file the first free number from `counter` on."""
    while True:
        path = folder / f"{name}_{counter:05}_{EXTENSION}"
        try:
            _rename_exclusively(temporary, path)
        except FileExistsError:  # another process took the number meanwhile
            counter += 1
            continue
        _sync_folder(folder)
        return path


def _rename_exclusively(source: Path, target: Path) -> None:
    if os.name == "nt":
        os.rename(source, target)  # refuses an existing target there
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # exFAT and some network folders have no links: hold the name with an empty file, then replace it.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(source, target)
        except OSError:
            target.unlink()
            raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    # Some network folders cannot; the file itself is on the disk by now.
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _sweep(folder: str | os.PathLike) -> None:
    """Delete the temporary files that killed processes left: those that nobody holds locked."""
    for path in Path(folder).glob(f"{_TEMPORARY}*.tmp"):
        with contextlib.suppress(OSError):  # gone already, or open elsewhere
            if fcntl is None:
                path.unlink()
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held elsewhere, or a filesystem without locks
        return False
    return True


# Folders of the host


def register_folders() -> None:
    """Add `models/<key>` and `output/<key>` of the pack's files, and the theatre's models, to the host's."""
    for key in (ACTION_IDENTIFIERS, FUSION_EMBEDDINGS, TRAINING_CHECKPOINTS):
        for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
            folder_paths.add_model_folder_path(key, os.path.join(parent, key))
        paths, _ = folder_paths.folder_names_and_paths[key]
        # An empty set would list every file. Fusions were published as Lightning's checkpoints.
        endings = {EXTENSION, ".ckpt"} if key == FUSION_EMBEDDINGS else {EXTENSION}
        folder_paths.folder_names_and_paths[key] = (paths, endings)
    if theatre_enabled():
        models = PACK_ROOT / "workflows" / "models"
        for key, names in THEATRE_FILES.items():
            if any((models / key / name).is_file() for name in names):
                folder_paths.add_model_folder_path(key, str(models / key))


def theatre_enabled() -> bool:
    """Whether the theatre is in the menus: `UNDERSTUDY_THEATRE`, else the setting `Understudy.Theatre`."""
    variable = os.environ.get("UNDERSTUDY_THEATRE", "").strip().lower()
    if variable:
        return variable not in ("0", "false", "no", "off")
    settings = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no settings yet, or damaged ones, which the host reports itself
        return True
    return not isinstance(values, dict) or values.get("Understudy.Theatre") is not False


def list_files(folder: str) -> list[str]:
    """The files that the host lists under the key `folder`, by relative name; none before it knows the key."""
    return folder_paths.get_filename_list(folder) if folder in folder_paths.folder_names_and_paths else []


def find(folder: str, name: str) -> Path:
    """The path of a listed file. Raises WeightFileError when it is gone."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        places = " or ".join(folder_paths.get_folder_paths(folder))
        raise refused(name, "was not found", f"Put it into {places} and reload the node list")
    return Path(path)
