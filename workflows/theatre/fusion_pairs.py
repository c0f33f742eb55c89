"""Pairs that image encoder and fusion embedding learn from: one puppet in two actions of one scene and view."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from pack.nodes.puppets import render, world
from pack.nodes.puppets.config import Take, actions_of

_KEY = 0xF9D3
_PART_CELLS = 32  # along a side of the kept part maps


def takes(index: int, seed: int, close_ups: bool = False) -> tuple[Take, Take]:
    """Source and target of a pair, of the split "train", so never a test identity.

    They share scene, light and view, as the published pictures of one shooting do. With `close_ups`, every seventh
    pair is one.
    """
    close = close_ups and index % world.CLOSE_UP_EVERY == world.CLOSE_UP_EVERY - 1
    target = world.still_take(index) if close else world.sample_take(index, "train")
    rng = np.random.default_rng([_KEY, seed, index])
    species = target.identity.species
    seen = [
        action for action in actions_of(target.framing)
        if (species, action) not in world.HELD_OUT[target.framing]
        and not (action == "raising hat" and target.identity.headwear == "none")
    ]
    others = [action for action in seen if action != target.action]
    source = dataclasses.replace(
        target, action=world.pick(rng, others), phase=round(float(rng.random()), 4), mirrored=bool(rng.random() < 0.5)
    )
    return source, target


def rendered(folder: Path, count: int, size: int, seed: int, close_ups: bool = False) -> dict[str, np.ndarray]:
    """Of every pair, rendered once and kept in `folder`: pictures uint8 [N, 3, H, W, 3] (source, pose, target), and
    of source and target: parts uint8 [N, 2, 32, 32], joints float32 [N, 2, 18, 3] as fractions of the frame, with 1
    where they lie inside it.
    """
    kind = "both" if close_ups else "full"
    paths = {
        name: folder / f"{name}_{kind}_{count}_{size}_{seed}.npy" for name in ("pictures", "parts", "joints")
    }
    if not all(path.exists() for path in paths.values()):
        print(f"rendering {count} pairs", flush=True)
        found = [_drawn(takes(i, seed, close_ups), size) for i in range(count)]
        for name, rows in zip(paths, zip(*found, strict=True), strict=True):
            temporary = paths[name].with_suffix(".part.npy")
            np.save(temporary, np.stack(rows))
            os.replace(temporary, paths[name])
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def _drawn(pair: tuple[Take, Take], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, target = (render.render(take, size) for take in pair)
    step = size // _PART_CELLS
    return (
        np.stack([source.image, render.draw_pose(target.joints, size), target.image]),
        np.stack([picture.parts[step // 2 :: step, step // 2 :: step] for picture in (source, target)]),
        np.stack([picture.joints / (size, size, 1) for picture in (source, target)]).astype(np.float32),
    )
