"""Pairs to train the theatre's fusion embedding on: one training puppet in two actions of one scene and camera."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from pack.nodes.puppets import render, world
from pack.nodes.puppets.config import NAMED_ACTIONS, UNNAMED_ACTIONS, Take

_KEY = 0xF9D3
_PART_CELLS = 32  # along a side of the kept part maps


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 7
    pairs: int = 6_000
    kept_back: int = 256  # of them, the last ones, that no stage learns: to look at while it learns
    size: int = 128  # pixels
    # The image encoder, before both stages: batches of so many pairs, three pictures each.
    vision_steps: int = 2_400
    vision_batch: int = 24
    vision_matrix_lr: float = 0.01  # Muon's own scale; the rate below is AdamW's
    vision_lr: float = 1e-3
    # Stage 1. Narrower than published, since embeddings have 128 numbers and not 768.
    combiner_width: int = 256
    combiner_steps: int = 200
    combiner_batch: int = 48
    combiner_lr: float = 3e-4
    # Stage 2, on the whole UNet.
    generator_width: int = 256
    generator_steps: int = 1_200
    generator_batch: int = 24
    generator_matrix_lr: float = 0.01
    generator_lr: float = 3e-4
    generator_ema: float = 0.998
    generator_min_snr: float = 5.0  # as the theatre's UNet was trained; published: 0
    warm_start: int = 0  # 1 begins stage 2 with the weights of the file beside this script


def takes(index: int, seed: int) -> tuple[Take, Take]:
    """Source and target of a pair: the target is take `index` of the split "train", so never a test identity.

    They share scene, light and camera, as the published pictures of one shooting do.
    """
    target = world.sample_take(index, "train")
    rng = np.random.default_rng([_KEY, seed, index])
    species = target.identity.species
    seen = [action for action in NAMED_ACTIONS if (species, action) not in world.HELD_OUT_PAIRS]
    others = [action for action in (*seen, *UNNAMED_ACTIONS) if action != target.action]
    source = dataclasses.replace(
        target, action=world.pick(rng, others), phase=round(float(rng.random()), 4), mirrored=bool(rng.random() < 0.5)
    )
    return source, target


def rendered(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """Of every pair, rendered once and kept in `folder`: pictures uint8 [N, 3, H, W, 3] (source, pose, target), and
    of source and target: parts uint8 [N, 2, 32, 32], joints float32 [N, 2, 18, 2] as fractions of the frame.
    """
    paths = {
        name: folder / f"{name}_{config.pairs}_{config.size}_{config.seed}.npy"
        for name in ("pictures", "parts", "joints")
    }
    if not all(path.exists() for path in paths.values()):
        print(f"rendering {config.pairs} pairs", flush=True)
        found = [_drawn(i, config) for i in range(config.pairs)]
        for name, rows in zip(paths, zip(*found, strict=True), strict=True):
            temporary = paths[name].with_suffix(".part.npy")
            np.save(temporary, np.stack(rows))
            os.replace(temporary, paths[name])
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def _drawn(index: int, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, target = (render.render(take, config.size) for take in takes(index, config.seed))
    step = config.size // _PART_CELLS
    return (
        np.stack([source.image, render.draw_pose(target.joints, config.size), target.image]),
        np.stack([picture.parts[step // 2 :: step, step // 2 :: step] for picture in (source, target)]),
        np.stack([picture.joints[:, :2] / config.size for picture in (source, target)]),
    )
