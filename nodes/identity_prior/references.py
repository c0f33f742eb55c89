"""The pictures that a prior learns: references with variants, and pictures of their class, given or made."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..training.drawing import sample
from ..training.loop import step_seed

# Ours: of the side; the outermost tenth is what a crop may lose.
_LEAST_CROP = 0.9
_CROPS = 3
_CLASS_STEPS = 20
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def variants(pictures: Sequence[torch.Tensor], texts: Sequence[str], augment: str, seed: int):
    """Pictures [1, H, W, 3] and texts with crops of each, and with mirror images of all, as `augment` asks.

    What is on the left in a picture is on the right in its mirror image's text.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, 2_000_000_011))
    chosen = []
    for picture, text in zip(pictures, texts, strict=True):
        chosen.append((picture, text))
        if augment != "none":
            chosen += [(_crop(picture, generator), text) for _ in range(_CROPS)]
    if augment == "crop_and_flip":
        chosen += [(picture.flip(2), _mirrored(text)) for picture, text in chosen]
    return [picture for picture, _ in chosen], [text for _, text in chosen]


def _mirrored(text: str) -> str:
    """The text with left and right in each other's place, in their case."""

    def other(match: re.Match) -> str:
        word = "right" if match[0].lower() == "left" else "left"
        return word.upper() if match[0].isupper() else word.title() if match[0][0].isupper() else word

    return _SIDE.sub(other, text)


def _crop(picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A part of the picture, of its proportions, at its full size."""
    share, left, top = torch.rand(3, generator=generator).tolist()
    height, width = picture.shape[1:3]
    share = _LEAST_CROP + (1 - _LEAST_CROP) * share
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    y, x = round(top * (height - rows)), round(left * (width - columns))
    part = picture[:, y : y + rows, x : x + columns].movedim(-1, 1)
    resized = torch.nn.functional.interpolate(part, (height, width), mode="bicubic", antialias=True)
    return resized.movedim(1, -1).clamp(0, 1)


def generate(model: Any, conditionings: Sequence[list], negative: list, shape: torch.Size, seed: int) -> list:
    """One latent of `shape` [1, C, ...] for each CONDITIONING, by the base model itself, as a VAE would give it."""
    made = []
    bar = comfy.utils.ProgressBar(len(conditionings))
    for i, conditioning in enumerate(conditionings):
        comfy.model_management.throw_exception_if_processing_interrupted()
        logging.info("[Understudy] drawing class picture %d of %d", i + 1, len(conditionings))
        own_seed = step_seed(seed, 3_000_000_019 + i)
        made.append(sample(model, conditioning, negative, shape, own_seed, _CLASS_STEPS).cpu())
        bar.update(1)
    return made
