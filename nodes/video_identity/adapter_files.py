"""Video identity adapters on disk: the official pickles, the community's safetensors, and our own, under one roof."""

from __future__ import annotations

from pathlib import Path

from .. import files
from .method import AdapterError, VideoAdapter, adapter_from

FOLDER = "loras"
# What torch.save writes; everything else is read as safetensors.
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def choices() -> list[str]:
    """Every file that the host lists as a LoRA."""
    return files.list_files(FOLDER)


def load(name: str) -> VideoAdapter:
    """The adapter in a listed file; weights stay in their type, on the CPU.

    Raises WeightFileError, naming the file and the first bad key, for any other kind of file.
    """
    path = files.find(FOLDER, name)
    pickled = Path(path).suffix.lower() in _PICKLES
    tensors = files.read_pickle(path) if pickled else files.read(path)[0]
    try:
        return adapter_from(tensors)
    except AdapterError as error:
        raise files.refused(path, f"is no video identity adapter: {error}", "Choose another file") from error


def save(adapter: VideoAdapter, filename_prefix: str) -> Path:
    """Write `output/loras/<prefix>_00001_.safetensors` under the published names; returns its path.

    Raises what files.save raises.
    """
    metadata = {
        "method": "Stand-In video identity adapter (arXiv 2508.07901)",
        "blocks": str(len(adapter.blocks)),
        "width": str(adapter.width),
    }
    return files.save(adapter.tensors(), metadata, FOLDER, filename_prefix)
