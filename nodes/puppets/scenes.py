"""Paper backdrops: a few layers of plain card with soft edges, in colours that let the puppet stand out."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from .config import RGB

# Colour of the light of each scene, multiplied onto everything, the puppet too.
TINTS: dict[str, RGB] = {
    "beach": (1.0, 0.99, 0.96), "forest": (0.97, 1.0, 0.95), "city": (1.0, 0.98, 0.97),
    "snow": (0.97, 0.99, 1.0), "stage": (1.0, 0.96, 0.92), "night": (0.84, 0.87, 0.98),
}
_DETAIL = 2  # the backdrop is drawn at twice its size


@functools.lru_cache(maxsize=32)
def _sky(side: int, top: RGB, bottom: RGB) -> Image.Image:
    ramp = np.linspace(0, 1, side)[:, None, None]
    sheet = np.broadcast_to(np.array(top) * (1 - ramp) + np.array(bottom) * ramp, (side, side, 3))
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


class _Board:
    """Card layers in coordinates of 0..1 over the frame."""

    def __init__(self, size: int, sky: RGB, horizon: RGB, shift: float):
        self.side = size * _DETAIL
        self.image = _sky(self.side, sky, horizon).copy()
        self.draw = ImageDraw.Draw(self.image)
        self.shift = shift

    def _scaled(self, points, depth: float = 1.0) -> list[tuple[float, float]]:
        return [((x + self.shift * depth) * self.side, y * self.side) for x, y in points]

    def card(self, points, colour: RGB, depth: float = 1.0, edge: float = 0.86) -> None:
        place = self._scaled(points, depth)
        lift = 0.016 * self.side
        self.draw.polygon([(x, y - lift) for x, y in place], _byte(colour, edge))
        self.draw.polygon(place, _byte(colour))

    def disc(self, x: float, y: float, r: float, colour: RGB, depth: float = 0.5) -> None:
        (px, py), pr = self._scaled([(x, y)], depth)[0], r * self.side
        self.draw.ellipse((px - pr, py - pr, px + pr, py + pr), _byte(colour))

    def hills(self, level: float, height: float, waves: float, phase: float, colour: RGB,
              depth: float = 1.0) -> None:
        top = [(x / 24, level - height * math.sin(2 * math.pi * (waves * x / 24 + phase)))
               for x in range(-5, 30)]
        self.card([*top, (1.3, 1.2), (-0.3, 1.2)], colour, depth)


def _byte(colour: RGB, factor: float = 1.0) -> tuple[int, int, int]:
    return tuple(round(min(1.0, c * factor) * 255) for c in colour)


def _beach(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.60, 0.83, 0.95), (0.90, 0.96, 0.98), shift)
    board.disc(rng.choice((0.16, 0.84)), 0.16, 0.085, (1.0, 0.90, 0.55))
    board.card([(-0.3, 0.50), (1.3, 0.50), (1.3, 1.2), (-0.3, 1.2)], (0.33, 0.66, 0.80), 0.6)
    board.hills(0.62, 0.012, 4, rng.random(), (0.52, 0.79, 0.86), 0.8)
    board.hills(0.74, 0.020, 1.2, rng.random(), (0.96, 0.88, 0.68))
    return board.image


def _forest(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.80, 0.92, 0.88), (0.90, 0.96, 0.86), shift)
    board.hills(0.62, 0.05, 1.1, rng.random(), (0.62, 0.80, 0.66), 0.5)
    for x in (0.06, 0.24, 0.76, 0.94):
        x += rng.uniform(-0.04, 0.04)
        top = rng.uniform(0.10, 0.26)
        board.card([(x - 0.02, 0.60), (x + 0.02, 0.60), (x + 0.02, 0.84), (x - 0.02, 0.84)],
                   (0.50, 0.38, 0.28))
        for row in (0, 1):
            y, w = top + 0.20 * row, 0.10 + 0.035 * row
            board.card([(x, y), (x + w, y + 0.34), (x - w, y + 0.34)], (0.33, 0.56, 0.42), edge=0.8)
    board.hills(0.80, 0.018, 1.3, rng.random(), (0.60, 0.78, 0.46))
    return board.image


def _city(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.86, 0.85, 0.93), (0.98, 0.91, 0.86), shift)
    rows = (((0.78, 0.77, 0.86), 0.5, 0.30), ((0.60, 0.62, 0.74), 1.0, 0.42))
    for row, (colour, depth, low) in enumerate(rows):
        x = -0.15 - 0.08 * row
        while x < 1.15:
            width = rng.uniform(0.15, 0.21)
            top = rng.uniform(low, low + 0.22)
            board.card([(x, top), (x + width, top), (x + width, 1), (x, 1)], colour, depth)
            if row:
                for wy in (0.05, 0.14, 0.23):
                    for wx in (0.3, 0.7):
                        px, py = x + wx * width, top + wy
                        board.card([(px - 0.017, py), (px + 0.017, py), (px + 0.017, py + 0.045),
                                    (px - 0.017, py + 0.045)], (0.98, 0.90, 0.62), depth, 1.0)
            x += width + 0.012
    board.card([(-0.3, 0.80), (1.3, 0.80), (1.3, 1.2), (-0.3, 1.2)], (0.70, 0.68, 0.70))
    for i in range(-1, 5):
        x = 0.28 * i
        board.card([(x, 0.925), (x + 0.14, 0.925), (x + 0.13, 0.95), (x - 0.01, 0.95)], (0.96, 0.93, 0.85),
                   edge=1.0)
    return board.image


def _snow(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.66, 0.75, 0.87), (0.84, 0.90, 0.96), shift)
    for x in (0.14 + rng.uniform(-0.06, 0.06), 0.83 + rng.uniform(-0.06, 0.06)):
        peak = rng.uniform(0.24, 0.34)
        board.card([(x - 0.36, 0.8), (x, peak), (x + 0.36, 0.8)], (0.55, 0.65, 0.79), 0.5)
        board.card([(x - 0.10, peak + 0.15), (x, peak), (x + 0.10, peak + 0.15), (x + 0.04, peak + 0.11),
                    (x, peak + 0.17), (x - 0.05, peak + 0.11)], (0.96, 0.98, 1.0), 0.5, 1.0)
    board.hills(0.70, 0.03, 1.1, rng.random(), (0.86, 0.91, 0.97), 0.8)
    board.hills(0.80, 0.018, 1.4, rng.random(), (0.97, 0.98, 1.0))
    for x, y in rng.random((16, 2)):
        board.disc(x * 1.2 - 0.1, y * 0.66, 0.013, (1.0, 1.0, 1.0), 0.8)
    return board.image


def _stage(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.97, 0.90, 0.76), (0.93, 0.80, 0.62), shift)
    board.card([(-0.3, 0.78), (1.3, 0.78), (1.3, 1.2), (-0.3, 1.2)], (0.78, 0.57, 0.38))
    for y in (0.86, 0.93):
        board.card([(-0.3, y), (1.3, y), (1.3, y + 0.018), (-0.3, y + 0.018)], (0.66, 0.46, 0.30), edge=1.0)
    drape = 0.17 + rng.uniform(-0.02, 0.03)
    for side in (0, 1):
        for fold in (2, 1, 0):
            x = drape * (fold + 1) / 3
            points = [(-0.3, -0.1), (x, -0.1), (x - 0.02, 0.5), (x + 0.01, 0.86), (-0.3, 0.86)]
            colour = (0.62, 0.17, 0.24) if fold % 2 else (0.72, 0.22, 0.29)
            board.card([(1 - x if side else x, y) for x, y in points], colour, 0.3)
    for i in range(5):
        board.disc(0.1 + 0.2 * i, -0.02, 0.115, (0.62, 0.17, 0.24), 0.3)
        board.disc(0.1 + 0.2 * i, -0.03, 0.105, (0.74, 0.23, 0.30), 0.3)
    return board.image


def _night(size: int, rng: np.random.Generator, shift: float) -> Image.Image:
    board = _Board(size, (0.20, 0.23, 0.44), (0.42, 0.43, 0.66), shift)
    moon = rng.choice((0.17, 0.83))
    board.disc(moon, 0.16, 0.085, (0.99, 0.96, 0.80))
    board.disc(moon - 0.035, 0.14, 0.070, (0.23, 0.26, 0.47))
    for x, y in rng.random((14, 2)):
        board.disc(x, y * 0.55, 0.011, (0.98, 0.96, 0.80))
    board.hills(0.66, 0.05, 0.9, rng.random(), (0.36, 0.42, 0.62), 0.6)
    board.hills(0.80, 0.018, 1.3, rng.random(), (0.40, 0.56, 0.56))
    return board.image


_DRAW = {"beach": _beach, "forest": _forest, "city": _city, "snow": _snow, "stage": _stage, "night": _night}


def backdrop(scene: str, seed: int, size: int, shift: float = 0.0) -> np.ndarray:
    """A scene without its puppet, uint8 [size, size, 3]; `shift` moves the layers by a fraction of the frame.

    Raises KeyError for an unknown scene.
    """
    image = _DRAW[scene](size, np.random.default_rng([0x5CE4E, seed]), shift)
    return np.asarray(image.reduce(_DETAIL))
