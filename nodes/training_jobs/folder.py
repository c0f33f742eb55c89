"""A job's folder, `output/training_jobs/<name>`: job.toml, and in `input` the data that it names.

What `workflows/train.py` reads, apart from nodes.py, since other programs may write it as well. Pictures are PNG
files in the order of their names, each with a .txt of the same name where it has a text; latents and conditionings
are safetensors files.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from PIL import Image

from ..files import publishing, weights
from ..files.names import normalise_prefix

FOLDER = "training_jobs"
CONFIG = "job.toml"
INPUT = "input"
SAMPLES = "samples"
_PLACES = 6  # digits in the name of a file


class JobFolder:
    """A new folder of a job; its name begins with `name`, and a number makes it a new one."""

    def __init__(self, name: str):
        root = Path(folder_paths.get_output_directory()) / FOLDER
        wanted = normalise_prefix(name, "folder")
        number = 1
        while True:
            self.name = f"{wanted}_{number:05}"
            self.path = root / self.name
            try:
                with publishing.said(self.name, root):
                    self.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        self.input = self.path / INPUT

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Where this block cannot write the job to its end, nothing of it stays."""
        with contextlib.ExitStack() as undo, publishing.said(self.name, self.path.parent):
            undo.callback(shutil.rmtree, self.path, ignore_errors=True)
            yield
            undo.pop_all()

    def write_pictures(self, folder: str, pictures: Sequence[torch.Tensor]) -> str:
        """Pictures [1, H, W, 3] or masks [1, H, W] as PNG files, rounded to 8 bits; returns `folder`."""
        for i, picture in enumerate(pictures):
            pixels = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(self._file(folder, i, ".png"))
        return folder

    def write_texts(self, folder: str, texts: Sequence[str]) -> str:
        """A text for each picture; returns `folder`."""
        for i, text in enumerate(texts):
            self._file(folder, i, ".txt").write_text(text, encoding="utf-8")
        return folder

    def write_tensors(self, folder: str, items: Sequence[tuple[dict[str, torch.Tensor], dict[str, str]]]) -> str:
        """Tensors with metadata, a safetensors file for each item; returns `folder`."""
        for tensors, metadata in items:
            weights.save(tensors, metadata, FOLDER, f"{self.name}/{INPUT}/{folder}/item")
        return folder

    def copy_folders(self, source: Path, folder: str, names: Sequence[str]) -> str:
        """Folders of data, whose files are linked where the disk allows it; returns `folder`."""
        for name in names:
            shutil.copytree(source / name, self.input / folder / name, copy_function=_link_or_copy)
        return folder

    def write_config(self, config: Mapping[str, Any], comment: str) -> Path:
        """job.toml, which makes the folder a job."""
        path = self.path / CONFIG
        text = "".join(f"# {line}\n" for line in comment.splitlines()) + "\n" + toml(config)
        path.write_text(text, encoding="utf-8")
        return path

    def _file(self, folder: str, index: int, ending: str) -> Path:
        parent = self.input / folder
        parent.mkdir(parents=True, exist_ok=True)
        return parent / f"{index + 1:0{_PLACES}}{ending}"


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def toml(values: Mapping[str, Any], table: tuple[str, ...] = ()) -> str:
    """Nested mappings of texts, numbers, switches and lists of them as TOML; None is left out.

    Raises ValueError, naming the key, for other values.
    """
    lines = [f"{_key(key)} = {_value(key, value)}" for key, value in values.items() if not _is_table(value)]
    text = "\n".join(line for line in lines if not line.endswith(" = "))
    text += "\n" if text else ""
    for key, value in values.items():
        if _is_table(value):
            path = (*table, key)
            text += f"\n[{'.'.join(map(_key, path))}]\n{toml(value, path)}"
    return text


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _text(key)


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but for one character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(key, part) for part in value)}]"
    raise ValueError(f"{key} is of type {type(value).__name__}, which job.toml cannot hold")
