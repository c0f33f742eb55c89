"""Cut paper: shapes on a supersampled canvas whose alpha channel holds the part label of every point."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .config import PART_NAMES, RGB

Point = tuple[float, float]

PART = {name: i for i, name in enumerate(PART_NAMES)}
INK: RGB = (0.13, 0.11, 0.13)
BRASS: RGB = (0.86, 0.68, 0.28)
CIRCLE = tuple((math.cos(2 * math.pi * i / 28), math.sin(2 * math.pi * i / 28)) for i in range(28))
_COVERED = [0] + [255] * 255


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`a` moved towards `b` by `share`."""
    return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))


def shade(colour: RGB, factor: float) -> RGB:
    return tuple(min(1.0, c * factor) for c in colour)


class Frame:
    """A local coordinate frame on the canvas: `unit` pixels a unit, turned by `angle` radians."""

    def __init__(self, origin: Point, unit: float, angle: float, wide: float = 1.0):
        """`wide` stretches the x axis."""
        self.origin, self.unit, self.angle, self.wide = origin, unit, angle, wide
        self.cos, self.sin = math.cos(angle) * unit, math.sin(angle) * unit

    def at(self, x: float, y: float) -> Point:
        x *= self.wide
        return (self.origin[0] + x * self.cos - y * self.sin, self.origin[1] + x * self.sin + y * self.cos)

    def points(self, points: Sequence[Point]) -> list[Point]:
        return [self.at(x, y) for x, y in points]

    def ellipse(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> list[Point]:
        """`angle` in degrees, clockwise."""
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        return [self.at(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in CIRCLE]


def capsule(p: Point, q: Point, start: float, end: float) -> list[Point]:
    """A limb from `p` to `q` with round ends of radii `start` and `end`."""
    a = math.atan2(q[1] - p[1], q[0] - p[0])
    steps = 8
    arc = [math.pi / 2 + math.pi * i / steps for i in range(steps + 1)]
    return ([(p[0] + start * math.cos(a + t), p[1] + start * math.sin(a + t)) for t in arc]
            + [(q[0] + end * math.cos(a + t + math.pi), q[1] + end * math.sin(a + t + math.pi)) for t in arc])


class Paper:
    """A canvas of `size` pixels, drawn `factor` times larger; lines are `pen` times as thick as in a full figure."""

    def __init__(self, size: int, factor: int, pen: float = 1.0):
        self.size, self.factor = size, factor
        self.sheet = Image.new("RGBA", (size * factor, size * factor), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.sheet)
        self.pixel = size * factor / 128 * pen  # a hundred-and-twenty-eighth of the frame, at pen 1
        self.ink = max(1, round(2.0 * self.pixel))

    def cut(self, points: list[Point], fill: RGB, part: str, edge: RGB | None = None,
            inked: bool = True) -> None:
        """A piece of card with a darker cut edge."""
        label = PART[part]
        if inked:
            line = edge or mix(fill, INK, 0.55)
            self.draw.line([*points, points[0], points[1]], _paint(line, label), self.ink)
        self.draw.polygon(points, _paint(fill, label))

    def stroke(self, points: list[Point], fill: RGB, part: str, width: float) -> None:
        """A drawn line; `width` in units of 1/128 of the frame."""
        self.draw.line(points, _paint(fill, PART[part]), max(1, round(width * self.pixel)), joint="curve")

    def brad(self, point: Point, part: str, radius: float = 1.5) -> None:
        """A brass pin through a joint."""
        r = radius * self.pixel
        self.draw.ellipse((point[0] - r, point[1] - r, point[0] + r, point[1] + r), _paint(BRASS, PART[part]))

    def reduced(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Premultiplied colour uint8 [H, W, 3], coverage uint8 [H, W] and part labels uint8 [H, W]."""
        colour = np.asarray(self.sheet.convert("RGB").reduce(self.factor))
        alpha = self.sheet.getchannel("A")
        coverage = np.asarray(alpha.point(_COVERED).reduce(self.factor))
        middle = self.factor // 2
        labels = np.asarray(alpha)[middle::self.factor, middle::self.factor].copy()
        return colour, coverage, labels


def _paint(colour: RGB, label: int) -> tuple[int, int, int, int]:
    return (round(colour[0] * 255), round(colour[1] * 255), round(colour[2] * 255), label)
