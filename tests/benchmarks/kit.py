"""What run.py needs where nothing can be installed: one archive of Python files, and stand-ins for what is missing.

`make` puts ComfyUI's own files and a few small packages into `.cache/benchmark-kit.zip`, from what is installed here.
Carry it to the other machine at the same place. There `unpack` makes them importable, and `stand_in` gives ComfyUI
modules for pictures, sound and servers, which a benchmark imports and never calls.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

from launcher import source

ARCHIVE = Path(".cache") / "benchmark-kit.zip"
COMMIT = "commit"
LARGEST = 5 * 2**20
COMFYUI = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "utils", "app")
# Of comfy-kitchen its Python code alone, whose kernels are Triton's and PyTorch's; the compiled ones have 130 MB.
PACKAGES = ("comfy_kitchen", "comfy_aimdo", "peft", "torchsde", "trampoline")
LIBRARIES = ("aimdo.so",)
_LARGEST_FILE = 600_000  # tokenizers' tables are larger
# What ComfyUI imports where nothing here calls it.
STAND_INS = (
    "PIL", "OpenGL", "aiohttp", "alembic", "av", "blake3", "kornia", "pydantic_settings", "requests", "scipy",
    "sentencepiece", "simpleeval", "spandrel", "sqlalchemy", "torchaudio", "torchsde", "torchvision", "yarl",
)


def make(root: Path) -> Path:
    """Write the archive of the pack at `root`. Raises SetupError where it would be too large to carry."""
    comfyui, target = source.obtain(root), root / ARCHIVE
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(COMMIT, commit(root))
        for file in sorted(comfyui.glob("*.py")) + [comfyui / "requirements.txt"]:
            archive.write(file, f"comfyui/{file.name}")
        for name in COMFYUI:
            _add(archive, comfyui / name, f"comfyui/{name}")
        for name in PACKAGES:
            _add(archive, _folder_of(name), f"site/{name}")
    if target.stat().st_size > LARGEST:
        raise source.SetupError(f"{target} has {target.stat().st_size / 2**20:.1f} MiB, and 5 can be carried")
    return target


def commit(root: Path) -> str:
    """Of the tree at `root`, with + where it was changed; empty without git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], cwd=root, capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return told.stdout.strip()


def _folder_of(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None:
        raise source.SetupError(f"{name} is not installed: start this in the environment that `tests/run.py` makes")
    return Path(found.submodule_search_locations[0])


def _add(archive: zipfile.ZipFile, folder: Path, name: str) -> None:
    for file in sorted(folder.rglob("*")):
        wanted = file.suffix == ".py" or file.name in LIBRARIES
        if wanted or file.suffix == ".json" and file.stat().st_size < _LARGEST_FILE:
            archive.write(file, f"{name}/{file.relative_to(folder).as_posix()}")


def unpack(root: Path) -> tempfile.TemporaryDirectory:
    """The archive's content, for as long as the result lives: folders `comfyui` and `site`."""
    folder = tempfile.TemporaryDirectory(prefix="understudy-kit-")
    with zipfile.ZipFile(root / ARCHIVE) as archive:
        archive.extractall(folder.name)
    return folder


class _Anything(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class StandIn(metaclass=_Anything):
    """Any name of a module that is missing: good for a type's place, an error when it is called."""

    def __init__(self, *_args, **_kwargs):
        raise RuntimeError("a part of ComfyUI was called that is not installed here")


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn


class _Finder:
    """Last of the finders, so that what is installed comes first."""

    @staticmethod
    def find_spec(name: str, _path=None, _target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _Module(spec.name)

    @staticmethod
    def exec_module(_module) -> None:
        pass


def stand_in() -> list[str]:
    """Make modules that are missing importable; returns their names."""
    missing = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder)
    return missing
