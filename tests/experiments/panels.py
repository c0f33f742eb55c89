"""One picture a method, of the case at the median of its score: how cases are chosen and cells put together.

A script's `picture(bench, rows)`, with rows(arm) those of the test, gives the frames that `--picture` saves.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from . import report

GAP, BUDGET = 4, 40_000  # pixels between cells; bytes of a picture
MILLISECONDS = 120  # a frame
Grid = Sequence[Sequence[np.ndarray | None]]
# (bench, arm -> rows) -> frames uint8 [H, W, 3], one or several
Picture = Callable[[object, Callable[[str], list[dict]]], list[np.ndarray]]


def middle(rows: Sequence[dict], measure: str, count: int = 1, of: str = "case") -> list[int]:
    """The `count` values of column `of` whose mean of `measure` is nearest to the median of all, nearest first."""
    means = {each: np.mean([row[measure] for row in rows if row[of] == each]) for each in {row[of] for row in rows}}
    median = np.median(list(means.values()))
    return sorted(means, key=lambda each: (abs(means[each] - median), each))[:count]


def grid(cells: Grid) -> np.ndarray:
    """Rows of pictures uint8 [H, W, 3] of one size as one on white; None leaves a cell empty."""
    height, width = next(cell for row in cells for cell in row if cell is not None).shape[:2]
    rows, columns = len(cells), max(map(len, cells))
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell is not None:
                top, left = i * (height + GAP), j * (width + GAP)
                sheet[top : top + height, left : left + width] = cell
    return sheet


def save(path: Path, frames: Sequence[np.ndarray]) -> None:
    """As a WebP, which moves where there are several; as good as BUDGET allows, and said where it is larger."""
    images = [Image.fromarray(frame) for frame in frames]
    for quality in (90, 84, 76, 68, 60, 50, 40):
        file = io.BytesIO()
        moving = {"save_all": True, "append_images": images[1:], "duration": MILLISECONDS, "loop": 0}
        images[0].save(file, "WEBP", quality=quality, method=6, **(moving if images[1:] else {}))
        if file.tell() <= BUDGET:
            break
    report.replace(path.with_suffix(".webp"), file.getvalue())
    over = f", more than {BUDGET}" if file.tell() > BUDGET else ""
    print(f"{path.stem}: {len(images)} of {images[0].width} x {images[0].height}, {file.tell()} bytes{over}")
