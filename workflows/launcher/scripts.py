"""Makes the pack and ComfyUI importable side by side in one process, for scripts and tests."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

from . import source

ROOT = Path(os.path.abspath(__file__)).parent.parent.parent


def alias_pack(root: Path = ROOT) -> types.ModuleType:
    """Make `pack` importable, as in `from pack.kernels import spectral_guidance`, whatever its folder is called.

    The root itself is removed from `sys.path`, since its `nodes/` would shadow ComfyUI's `nodes.py`.
    """
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != str(root)]
    if "pack" not in sys.modules:
        module = types.ModuleType("pack")
        module.__path__ = [str(root)]
        sys.modules["pack"] = module
    return sys.modules["pack"]


def add_comfy_path(base_directory: Path, cpu: bool = True, root: Path = ROOT) -> Path:
    """Make ComfyUI importable and return its folder; models, input, output and temp are in `base_directory`.

    Call it before anything imports `comfy.model_management` or `folder_paths`, which read these settings once.
    """
    comfyui = source.obtain(root)
    if str(comfyui) not in sys.path:
        sys.path.insert(0, str(comfyui))
    # Only the pack's copy of ComfyUI is written to, with __pycache__ folders.
    sys.dont_write_bytecode = comfyui != source.cached(root)
    from comfy.cli_args import args

    args.base_directory = str(base_directory)
    args.cpu = cpu
    return comfyui
