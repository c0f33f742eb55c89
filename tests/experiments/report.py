"""What every experiment writes: rows as CSV, tables with paired intervals, claims, contact sheets, and where it ran.

Tables and claims take the rows of all arms, one or more a case: {"arm", "case", measure: number, ...}. Whole
clusters are resampled: `cluster` names the column that tells them, such as the subject that several cases share.
"""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import platform
import re
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
    """One row a case; numbers with five significant digits. Compressed where the name ends in .gz."""
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
    content = text.getvalue().encode()
    replace(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_json(path: Path, content: dict) -> None:
    """Lists of numbers have a line each."""
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1))
    replace(path, (text + "\n").encode())


def summary(rows: Sequence[dict], measures: Iterable[str]) -> dict:
    """{measure: [mean, low, high]} of a 95 % interval over the cases that have it."""
    found: dict = {"cases": len(rows)}
    for name in measures:
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = [round(v, 4) for v in metrics.mean_interval(np.array(values))]
    return found


def bootstrap(values: np.ndarray, clusters: np.ndarray, resamples: int = 5_000, seed: int = 0) -> list[float]:
    """[mean, low, high] of 95 %: the percentile bootstrap over whole clusters; both arrays are [cases]."""
    _, places = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(places, np.asarray(values, float)), np.bincount(places)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return [float(np.mean(values)), float(low), float(high)]


def by_case(rows: Sequence[dict], arm: str, measure: str) -> dict[int, float]:
    """{case: mean over its rows} of an arm, the cases that have the measure."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and measure in row:
            found.setdefault(int(row["case"]), []).append(float(row[measure]))
    return {case: float(np.mean(values)) for case, values in found.items()}


def table(rows: Sequence[dict], arms: Iterable[str], measures: Iterable[str], cluster: str = "case") -> dict:
    """{arm: {"cases": n, measure: [mean, low, high]}} of the arms that have rows."""
    clusters, found = _clusters(rows, cluster), {}
    for arm in arms:
        means = {measure: by_case(rows, arm, measure) for measure in measures}
        if any(means.values()):
            intervals = {
                measure: bootstrap(np.array(list(own.values())), np.array([clusters[case] for case in own]))
                for measure, own in means.items() if own
            }
            found[arm] = {"cases": max(map(len, means.values())), **intervals}
    return found


def _clusters(rows: Sequence[dict], cluster: str) -> dict[int, object]:
    return {int(row["case"]): row[cluster] for row in rows if cluster in row}


@dataclasses.dataclass(frozen=True)
class Claim:
    """That `measure` of `arm` is at most `factor` times that of `other` (an arm, or a number).

    `at_least` turns it round; "no lower" is at_least with a margin of 0.05. `other_measure` compares two measures.
    """

    says: str
    arm: str
    measure: str
    other: str | float
    factor: float = 1.0
    margin: float = 0.0
    at_least: bool = False
    other_measure: str = ""


def judged(rows: Sequence[dict], claim: Claim, cluster: str = "case") -> dict | None:
    """The paired difference [mean, low, high] and "holds", "in the mean" or "not"; None where an arm has no rows."""
    ours = by_case(rows, claim.arm, claim.measure)
    if isinstance(claim.other, str):
        theirs = by_case(rows, claim.other, claim.other_measure or claim.measure)
    else:
        theirs = dict.fromkeys(ours, claim.other)
    cases, clusters = sorted(ours.keys() & theirs.keys()), _clusters(rows, cluster)
    if not cases:
        return None
    sign = -1 if claim.at_least else 1
    values = np.array([sign * (ours[case] - claim.factor * theirs[case]) - claim.margin for case in cases])
    mean, low, high = bootstrap(values, np.array([clusters[case] for case in cases]))
    verdict = "holds" if high < 0 else "in the mean" if mean < 0 else "not"
    return {"claim": claim.says, "arm": claim.arm, "other": claim.other, "cases": len(cases),
            "too much": [round(v, 4) for v in (mean, low, high)], "verdict": verdict}


def claims(rows: Sequence[dict], of: Iterable[Claim], cluster: str = "case") -> list[dict]:
    """Every claim that can be judged by the rows there are."""
    return [found for claim in of if (found := judged(rows, claim, cluster))]


def text(tables: dict) -> str:
    """What `table` and `claims` found, as Markdown: {"arms": a table, "claims": [...], other tables}."""
    lines: list[str] = []
    for title, found in tables.items():
        if isinstance(found, list):
            lines += [f"- {c['claim']}: {c['verdict']} ({c['arm']} / {c['other']}, {c['cases']} cases, too much by "
                      f"{c['too much'][0]:.3g}, {c['too much'][1]:.3g} to {c['too much'][2]:.3g})" for c in found]
            continue
        measures = list(dict.fromkeys(key for row in found.values() for key in row))
        lines += [f"\n**{title}**\n", f"| | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        for arm, row in found.items():
            cells = [_cell(row[measure]) if measure in row else "" for measure in measures]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | Sequence[float]) -> str:
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return "{:.3g} ({:.3g} to {:.3g})".format(*value)


def contact_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], budget: int = 48_000) -> None:
    """Labelled rows of pictures uint8 [N, H, W, 3] as one JPEG or WebP of at most `budget` bytes."""
    (height, wide), label = rows[0][1].shape[1:3], 14
    size = wide * max(len(pictures) for _, pictures in rows), len(rows) * (height + label)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, pictures) in enumerate(rows):
        top = i * (height + label)
        draw.text((3, top + 1), title, fill="black")
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (j * wide, top + label))
    for quality in (88, 80, 70, 60, 45, 30):
        file = io.BytesIO()
        sheet.save(file, Image.registered_extensions()[path.suffix], quality=quality)
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
