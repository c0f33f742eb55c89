"""Explanations as one labelled picture; apart, since it knows neither a method nor ComfyUI."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .. import labels
from ..explanations import Explanation, Panel

_CELL, _TALLEST = 64, 18  # pixels: a map's longer side, and a table's cell
_LABEL, _LINE, _MARGIN = 150, 18, 12
_TEXT = 640  # least width, for the words
# From none to the highest: black, violet, orange, white. Ours; even in brightness, so that it also reads in grey.
_COLOURS = np.array([[0, 0, 0], [84, 24, 110], [188, 60, 82], [246, 150, 40], [255, 255, 240]], dtype=float)


def draw(explanations: Sequence[Explanation]) -> torch.Tensor:
    """One picture [1, H, W, 3] in 0..1 of all explanations, one below the other, each with its words."""
    width = max(_TEXT, *(_size(panel)[0] for explanation in explanations for panel in explanation.panels))
    width += 2 * _MARGIN
    height = _MARGIN + sum(_height(explanation, width) for explanation in explanations)
    image, pen = labels.canvas(width, height)
    top = _MARGIN
    for explanation in explanations:
        labels.draw_text(pen, (_MARGIN, top), explanation.title, width - 2 * _MARGIN, size=15)
        top += 2 * _LINE
        for panel in explanation.panels:
            _draw_panel(image, pen, panel, top)
            top += _size(panel)[1] + _MARGIN
        for line in _wrapped(explanation, width):
            labels.draw_text(pen, (_MARGIN, top), line, width - 2 * _MARGIN)
            top += _LINE
        top += _MARGIN
    return torch.from_numpy(np.array(image)).float()[None] / 255


def heat(values: np.ndarray) -> np.ndarray:
    """Colours [..., 3], 0..255, of values 0..1."""
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, places, _COLOURS[:, i]) for i in range(3)], -1).round().astype(np.uint8)


def _cell(panel: Panel) -> tuple[int, int]:
    """Width and height of a cell in pixels."""
    height, width = panel.cells.shape[-2:]
    if height == width == 1:
        return _CELL, _TALLEST
    scale = _CELL / max(height, width)
    return max(8, round(width * scale)), max(8, round(height * scale))


def _size(panel: Panel) -> tuple[int, int]:
    width, height = _cell(panel)
    return _LABEL + len(panel.columns) * (width + 2), 2 * _LINE + len(panel.rows) * (height + 2)


def _height(explanation: Explanation, width: int) -> int:
    panels = sum(_size(panel)[1] + _MARGIN for panel in explanation.panels)
    return 2 * _LINE + panels + _LINE * len(_wrapped(explanation, width)) + _MARGIN


def _draw_panel(image: Image.Image, pen, panel: Panel, top: int) -> None:
    scale = f" (white is {panel.highest:.1%})" if panel.highest != 1 else ""
    labels.draw_text(pen, (_MARGIN, top), f"{panel.title}{scale}", image.width - 2 * _MARGIN)
    width, height = _cell(panel)
    left, top = _MARGIN + _LABEL, top + _LINE
    for column, label in enumerate(panel.columns):
        labels.draw_text(pen, (left + column * (width + 2), top), label, width, size=10)
    top += _LINE
    for row, label in enumerate(panel.rows):
        labels.draw_text(pen, (_MARGIN, top + row * (height + 2)), label, _LABEL - 4, size=11)
    values = (panel.cells.float() / panel.highest).clamp(0, 1).numpy()
    for row, column in itertools.product(range(len(panel.rows)), range(len(panel.columns))):
        cell = Image.fromarray(heat(values[row, column])).resize((width, height), Image.Resampling.NEAREST)
        image.paste(cell, (left + column * (width + 2), top + row * (height + 2)))


def _wrapped(explanation: Explanation, width: int) -> list[str]:
    """The words in lines of about the picture's width."""
    most = width // 6
    lines = []
    for text in explanation.lines:
        line = ""
        for word in text.split():
            if len(line) + len(word) >= most:
                lines.append(line)
                line = "   "
            line = f"{line} {word}" if line.strip() else line + word
        lines.append(line)
    return lines
