"""The files of the published pack, for the tests that read its source."""

import ast
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from launcher.scripts import ROOT

NOT_OURS = {".git", ".cache", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}


def all_files(root: Path = ROOT) -> list[str]:
    """Every file of the working tree, with `/`, relative to the root."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_OURS)
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in sorted(set(names) - NOT_OURS)]
    return paths


@cache
def shipped_files(root: Path = ROOT) -> tuple[str, ...]:
    """The files that `.comfyignore` leaves in the published pack; git applies its rules."""
    names = all_files(root)
    ignore = root / ".comfyignore"
    assert ignore.is_file(), "The pack has no .comfyignore, so its tests would be published with it."
    git = shutil.which("git")
    assert git, "Install git: it reads .comfyignore."
    rules = f"core.excludesFile={ignore}"
    command = [git, "-c", rules, "check-ignore", "--no-index", "--stdin", "-z"]
    run = subprocess.run(command, input="\0".join(names), cwd=root, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    ignored = set(run.stdout.split("\0"))
    return tuple(name for name in names if name not in ignored)


def shipped_modules() -> list[str]:
    """The Python files among them."""
    return [name for name in shipped_files() if name.endswith(".py")]


@cache
def tree(name: str) -> ast.Module:
    """The syntax tree of a file of the pack."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)
