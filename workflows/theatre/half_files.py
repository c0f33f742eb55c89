"""The theatre's shipped weights on disk: small, in fp16, whole or not at all."""

import hashlib
import os
from pathlib import Path

import torch
from pack.nodes.consent.record import NO_PERSON, ConsentRecord
from safetensors.torch import save_file

NOBODY = ConsentRecord("paper puppets, drawn by this pack", (NO_PERSON,))  # what the learned files know
LIMIT = 16 * 2**20  # bytes a file


def save_half(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """fp16, whole or not at all. Raises ValueError for a file over the limit or a value that fp16 cannot hold."""
    half = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in tensors.items()}
    if bad := [key for key, value in half.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path.name}: {bad[0]} is not finite in fp16; nothing was written")
    if (size := sum(value.nbytes for value in half.values())) > LIMIT - 2**18:
        raise ValueError(f"{path.name} would have {size} bytes, over {LIMIT}; nothing was written")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(half, temporary, {"format": "pt", **metadata})
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
