"""What every experiment writes: rows as CSV, a summary as JSON, a contact sheet, and where it ran."""

import csv
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from .measuring import metrics

RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, str]:
    """Processor, accelerator and versions, without names or paths of the machine."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), processor
            )
    return {
        "processor": f"{processor}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def command(script: str) -> str:
    """The command as a reader would type it."""
    return " ".join(["python", f"tests/experiments/{script}", *sys.argv[1:]])


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """One row a case; numbers with five significant digits."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                k: f"{v:.5g}" if isinstance(v, float) else int(v) if isinstance(v, (bool, np.bool_)) else v
                for k, v in row.items()
            }
        )
    replace(path, text.getvalue().encode())


def write_json(path: Path, content: dict) -> None:
    replace(path, (json.dumps(content, indent=1) + "\n").encode())


def summary(rows: Sequence[dict], measures: Iterable[str]) -> dict:
    """{measure: [mean, low, high]} of a 95 % interval over the cases that have it."""
    found: dict = {"cases": len(rows)}
    for name in measures:
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = [round(v, 4) for v in metrics.mean_interval(np.array(values))]
    return found


def contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], budget: int = 200_000) -> None:
    """Labelled rows of pictures uint8 [N, H, W, 3] as one JPEG of at most `budget` bytes."""
    size, label = rows[0][1].shape[1], 14
    width = size * max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (width, len(rows) * (size + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, pictures) in enumerate(rows):
        top = i * (size + label)
        draw.text((3, top + 1), title, fill="black")
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (j * size, top + label))
    for quality in (88, 80, 70, 60, 45, 30):
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality)
        if file.tell() <= budget:
            break
    replace(path, file.getvalue())


def fingerprint(*things: object) -> str:
    """Ten hexadecimal digits that change with the settings, by their `repr`."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:10]


class Pictures:
    """Sampled pictures kept one file a case, so that an interrupted run goes on where it stopped."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, count: int, batch: int, sample) -> np.ndarray:
        """uint8 [count, H, W, 3]; `sample(start, stop)` makes what is not there yet."""
        found = []
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            path = self.folder / f"{name}_{start}_{stop}.npy"
            if not path.exists():
                file = io.BytesIO()
                np.save(file, sample(start, stop))
                replace(path, file.getvalue())
            found.append(np.load(path))
        return np.concatenate(found)
