"""The git-ignored Python environment of the two commands, created with venv and pip at the first start.

This file and what it imports also parse on Python 3.8, so that an old Python is told what to do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from . import source
from .locks import locked, say

MIN_PYTHON = (3, 10)
MIN_FREE_BYTES = 12 * 10**9
STAMP = "understudy-installed"


def enter(root: Path) -> None:
    """Return only inside the environment of the pack at `root`, which is created if it is missing.

    In any other Python the script is restarted with the environment's. Ends the program with a message if the
    environment cannot be created.
    """
    try:
        check_python(sys.version_info[:2])
        python = ensure(root)
    except source.SetupError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        say("\nStopped; the next start continues from here.")
        sys.exit(130)
    if Path(sys.prefix).resolve() != (root / ".cache" / "env").resolve():
        become([str(python), *sys.argv])


def become(command: list[str]) -> NoReturn:
    """Run `command` in place of this program, so that it gets Ctrl-C and its exit code is ours."""
    sys.stdout.flush()
    if sys.platform == "win32":
        # On Windows, execv returns to the shell at once.
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def check_python(version: tuple[int, int]) -> None:
    """Raise SetupError if this Python cannot run ComfyUI."""
    if version < MIN_PYTHON:
        raise source.SetupError(
            f"Python {version[0]}.{version[1]} is too old: install Python 3.12 (3.10 or newer will do) and "
            "use it to start this, for example `python3.12 workflows/run.py`."
        )


def ensure(root: Path) -> Path:
    """Create or complete the environment of the pack at `root`; returns its Python."""
    cache = root / ".cache"
    cache.mkdir(exist_ok=True)
    folder = cache / "env"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    with locked(cache / "env.lock"):
        comfyui = source.find(root)
        if comfyui and is_current(folder, python, comfyui, root):
            return python
        check_disk(cache, folder)
        if not works(python):
            say("Creating a Python environment in .cache/env")
            make(folder)
        if not comfyui:
            say(f"Downloading ComfyUI {source.VERSION}")
            comfyui = source.obtain(root, str(python))
        say("Installing PyTorch, ComfyUI's requirements and the tools (about 6 GB, once)")
        install(python, requirement_files(comfyui, root), cache / "setup.log")
        (folder / STAMP).write_text(fingerprint(comfyui, root), encoding="utf-8")
    return python


def requirement_files(comfyui: Path, root: Path) -> list[Path]:
    """The requirement files that are installed together."""
    return [
        root / "workflows" / "launcher" / "requirements.txt",
        root / "requirements.txt",
        comfyui / "requirements.txt",
    ]


def fingerprint(comfyui: Path, root: Path) -> str:
    """A hash of every requirement text."""
    texts = b"\0".join(file.read_bytes() for file in requirement_files(comfyui, root))
    return hashlib.sha256(texts).hexdigest()


def is_current(folder: Path, python: Path, comfyui: Path, root: Path) -> bool:
    """True if the environment was completely installed, with the present requirements."""
    stamp = folder / STAMP
    return (
        stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint(comfyui, root) and works(python)
    )


def works(python: Path) -> bool:
    """True if this Python starts (its base may have been removed), is new enough and has pip."""
    if not python.exists():
        return False
    probe = "import sys, importlib.util as u; sys.exit(sys.version_info < %s or not u.find_spec('pip'))"
    return subprocess.call([str(python), "-c", probe % (MIN_PYTHON,)], stderr=subprocess.DEVNULL) == 0


def make(folder: Path) -> None:
    """Create an empty environment with pip in `folder`, replacing its content."""
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise source.SetupError(
            f"{result.stdout.strip()}\nPython could not create an environment in {folder}. On Debian and "
            "Ubuntu run `sudo apt install python3-venv`; elsewhere install Python from its own installer."
        )


def check_disk(cache: Path, folder: Path) -> None:
    """Raise SetupError if a first installation would not fit on the disk of `cache`."""
    free = shutil.disk_usage(str(cache)).free
    if free < MIN_FREE_BYTES and not (folder / STAMP).exists():
        raise source.SetupError(
            f"{cache} has {free / 1e9:.1f} GB free and {MIN_FREE_BYTES / 1e9:.0f} GB are needed for PyTorch "
            "and ComfyUI's requirements. Free some space, or clone the pack to a larger disk."
        )


def install(python: Path, files: list[Path], log: Path) -> None:
    """Install the requirement files together; pip's output goes to `log`, its last line to the terminal."""
    options = ["--disable-pip-version-check", "--progress-bar=off", "--no-compile"]
    command = [str(python), "-m", "pip", "install", *options]
    for file in files:
        command += ["-r", str(file)]
    width = shutil.get_terminal_size().columns - 1
    with open(str(log), "w", encoding="utf-8") as record:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            record.write(line)
            if sys.stdout.isatty():
                print("\r" + line.strip()[:width].ljust(width), end="", flush=True)
        process.wait()
    if sys.stdout.isatty():
        print("\r" + " " * width, end="\r", flush=True)
    if process.returncode:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise source.SetupError(
            f"{last}\npip could not install the requirements (its full output: {log}). Check the network, "
            "pip's settings and the free disk space, then start this again: it goes on where it stopped."
        )
    compile_all(python)


def compile_all(python: Path, folder: str = "") -> None:
    """Compile the modules in `folder`, or every package of this Python, on all cores: pip uses one.

    What is compiled already is left; templates that are no Python stay as they are.
    """
    script = (
        "import compileall, sys, sysconfig; "
        "compileall.compile_dir(sys.argv[1] or sysconfig.get_paths()['purelib'], quiet=2, workers=0)"
    )
    subprocess.call([str(python), "-c", script, folder])
