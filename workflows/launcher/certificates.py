"""Where Label Media's certificate is, and a copy of it for a run, which has a user folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import source

FILES = ("certificate.pem", "private_key.pem", "trusted.pem")
_PLACE = Path("user", "__understudy")  # in ComfyUI's base folder


def folder(root: Path) -> Path:
    """Where the ComfyUI that the pack at `root` is in, or COMFYUI_PATH, has them; else that of `run.py --serve`."""
    comfyui = source.find(root)
    base = comfyui if comfyui and comfyui != source.cached(root) else root / ".cache" / "serve"
    return base / _PLACE


def lend(root: Path, base: Path) -> Path | None:
    """Copy them into `base`, a run's folder that only its owner can read; returns where from, if there are any."""
    place = folder(root)
    files = [place / name for name in FILES if (place / name).is_file()]
    if not files:
        return None
    (base / _PLACE).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, base / _PLACE)
    return place
