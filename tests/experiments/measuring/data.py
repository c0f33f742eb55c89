"""Renders with their truth, for training and judging the measuring net, and the damage done to them."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pack.nodes.puppets import render, scenes, world
from pack.nodes.puppets.config import (
    ALL_ACTIONS,
    HEADWEAR,
    NAMED_ACTIONS,
    PATTERNS,
    SCENES,
    SPECIES,
    Take,
    actions_of,
)

TEST_KEY, EYE_KEY = 0xE7E, 0xE7F  # seed the takes of the test identities and of training
CLOSE_UPS = 0.35  # of the pictures that the eye learns from


@dataclass
class Renders:
    """Pictures and truth.

    images uint8 [N, H, W, 3], parts uint8 [N, H, W], joints float32 [N, 18, 3] as fractions of the frame and
    visible or not, labels int64 [N, 4] = action, species, pattern, headwear.
    """

    images: np.ndarray
    parts: np.ndarray
    joints: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def test_take(index: int) -> Take:
    """Take `index` of the test identities: identity, named action and scene cycle, the camera is seeded."""
    rng = np.random.default_rng([TEST_KEY, index])
    people = world.test_identities()
    action = NAMED_ACTIONS[(index + index // len(people)) % len(NAMED_ACTIONS)]
    return world.staged(people[index % len(people)], action, SCENES[index % len(SCENES)], rng)


def eye_take(index: int) -> Take:
    """Take `index` that the eye learns from: every species in every action, so that neither tells the other.

    The theatre's held-out pairs are among them; test identities are not.
    """
    rng = np.random.default_rng([EYE_KEY, index])
    who = world.sample_identity(int(rng.integers(2**31)))
    framing = "close_up" if rng.random() < CLOSE_UPS else "full"
    action, scene = world.pick(rng, actions_of(framing)), world.pick(rng, SCENES)
    return world.staged(who, action, scene, rng, framing)


def take(index: int, split: str) -> Take:
    """The take of an index in "eye", "test", or a split of the world, such as "unseen" or "unseen close-ups"."""
    own = {"eye": eye_take, "test": test_take}
    if split in own:
        return own[split](index)
    name, _, close = split.partition(" ")
    return world.sample_take(index, name, "close_up" if close else "full")


def labels(shown: Take) -> tuple[int, int, int, int]:
    """(action, species, pattern, headwear) as positions in the world's tuples."""
    who = shown.identity
    return (
        ALL_ACTIONS.index(shown.action),
        SPECIES.index(who.species),
        PATTERNS.index(who.pattern),
        HEADWEAR.index(who.headwear),
    )


def draw(start: int, stop: int, split: str, size: int) -> Renders:
    """The renders of takes `start` to `stop` - 1."""
    takes = [take(i, split) for i in range(start, stop)]
    pictures = [render.render(t, size) for t in takes]
    joints = np.stack([p.joints for p in pictures]) / np.array([size, size, 1], np.float32)
    return Renders(
        np.stack([p.image for p in pictures]),
        np.stack([p.parts for p in pictures]),
        joints,
        np.array([labels(t) for t in takes]),
    )


def renders(folder: Path, split: str, count: int, size: int, workers: int = 1) -> Renders:
    """The first `count` renders of a split, kept in `folder` between runs."""
    path = folder / f"{split.replace(' ', '_')}_{count}_{size}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, count, 250)
        with ProcessPoolExecutor(workers) as pool:
            parts = list(
                pool.map(
                    draw,
                    starts,
                    [min(s + 250, count) for s in starts],
                    [split] * len(starts),
                    [size] * len(starts),
                )
            )
        temporary = path.with_suffix(".part.npz")
        np.savez(
            temporary,
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Renders)},
        )
        os.replace(temporary, path)
    with np.load(path) as stored:
        return Renders(**{f.name: stored[f.name] for f in fields(Renders)})


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 or 0..1 float [N, H, W, 3] to float32 [N, 3, H, W] in 0..1."""
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    return tensor.permute(0, 3, 1, 2)


def _uniform(rng: np.random.Generator, low: float, high: float, count: int) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Down to `size` pixels and back: what a coarse decoder leaves."""
    small = F.interpolate(images, size=(size, size), mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False)


def damaged(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur, blotches, noise, colour shift and coarse levels, mild enough for a person to read the picture.

    images float [N, 3, H, W] in 0..1; each picture of a batch gets strengths of its own.
    """
    count, _, height, width = images.shape
    soft = _resized(images, int(rng.integers(height * 2 // 5, height + 1)))
    out = torch.lerp(images, soft, _uniform(rng, 0, 1, count))
    blotches = F.interpolate(
        _normal(rng, (count, 3, height // 8, width // 8)), size=(height, width), mode="bilinear"
    )
    out = out + blotches * _uniform(rng, 0, 0.07, count)
    out = out + _normal(rng, tuple(out.shape)) * _uniform(rng, 0, 0.06, count)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (count, 3, 1, 1)).astype(np.float32))
    out = out * gain + _uniform(rng, -0.05, 0.05, count)
    levels = _uniform(rng, 12, 64, count)
    return ((out.clamp(0, 1) * levels).round() / levels).clamp(0, 1)


REJECT_KINDS = ("mixture", "half", "noise", "shuffle", "blur", "empty")


def rejects(images: torch.Tensor, rng: np.random.Generator, kind: str) -> torch.Tensor:
    """Pictures [N, 3, H, W] that show no clear puppet or action; N >= 2.

    `mixture`: two puppets blended; `half`: a half replaced by another picture's, upside down; `noise`:
    drowned in noise; `shuffle`: the quarters change places; `blur`: 8 pixels across; `empty`: the scene.
    """
    count, _, height, width = images.shape
    other = images.roll(1, 0)
    if kind == "mixture":
        return torch.lerp(images, other, _uniform(rng, 0.38, 0.62, count))
    if kind == "half":
        out, turned = images.clone(), other.flip(-2)
        cut = int(rng.integers(height * 2 // 5, height * 3 // 5))
        if rng.random() < 0.5:
            out[:, :, cut:] = turned[:, :, cut:]
        else:
            out[..., cut:] = turned[..., cut:]
        return out
    if kind == "noise":
        strength = _uniform(rng, 0.6, 3.0, count)
        return (0.5 + (images - 0.5) / (1 + 2 * strength) + _normal(rng, tuple(images.shape)) * 0.3).clamp(
            0, 1
        )
    if kind == "shuffle":
        middle = [t for half in images.chunk(2, 2) for t in half.chunk(2, 3)]
        a, b, c, d = (middle[i] for i in ((3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1))[int(rng.integers(3))])
        return torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
    if kind == "blur":
        return _resized(images, 8).clamp(0, 1)
    if kind == "empty":
        seeds, names = rng.integers(2**31, size=count), rng.choice(SCENES, count)
        drawn = [scenes.backdrop(str(n), int(s), height, 0.0) for n, s in zip(names, seeds, strict=True)]
        return to_tensor(np.stack(drawn))
    raise ValueError(f"unknown kind of reject {kind!r}: choose one of {', '.join(REJECT_KINDS)}")
