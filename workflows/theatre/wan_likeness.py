"""The transformer's last stage: what a clean shot shows is to be seen in the picture, while the loss looks there.

A puppet covers a fifth of a picture, its clothes a tenth; where every place counts the same, what a shot tells of
them is lost in what the scene leaves open.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import wan_adapter
import wan_looks
import wan_stages as stages
from pack.nodes.puppets import render, world
from pack.nodes.puppets.config import Take
from wan_stages import Batch, Config

_FIRST_SHOT = 100_000  # beside the numbers of earlier shots
_MIDDLES = (0, 2.5, 6.5, 10.5, 14.5)  # of the frames that each latent of a clip stands for


def train(state: Path, config: Config, device, deadline: float, encoder: Path) -> bool:
    """Goes on from `train_aligned`: of ten steps five have pictures, four clips, and one is of the stage `looks`.

    Shots are always given, most captions name no clothes, and a place on the puppet counts more than another, which
    falls to nothing until the last step.
    """
    images, clips = stages.latents(state, config)
    alone = wan_adapter.alone(config)[:config.shot_clips]
    taken = [world.sample_take(i, "train") for i in range(config.likeness_pictures)]
    filmed = [stages.clip_takes(i)[0] for i in alone]
    shots = stages.kept(state / f"likeness_shots_{config.size}_{len(taken)}_{len(filmed)}.npy", lambda: (
        wan_looks.encoded_shots(state, config, taken + filmed, _FIRST_SHOT, device)
    ))
    still = stages.kept(state / f"puppet_in_pictures_{config.size}_{len(taken)}.npy", lambda: (
        np.stack([covered(take, config.size) for take in taken])[:, None]
    ))
    moving = stages.kept(state / f"puppet_in_clips_{config.size}_{len(filmed)}.npy", lambda: (
        np.stack([[covered(moment, config.size) for moment in moments(take)] for take in filmed])
    ))

    def draw(rng: np.random.Generator, index: int) -> Batch:
        if index % 10 == 0:
            return wan_looks.clips_with_first_frame(clips, rng, config)
        if index % 2:
            rows = rng.integers(0, len(taken), config.shots_batch)
            takes, data, puppet, numbers = [taken[i] for i in rows], images[rows], still[rows], rows
        else:
            rows = rng.integers(0, len(filmed), config.clip_batch)
            takes, data, puppet = [filmed[i] for i in rows], clips[np.array(alone)[rows]], moving[rows]
            numbers = len(taken) + rows
        bare, before, elsewhere = rng.random((3, len(rows))) < np.array([config.likeness_bare, 0.5, 0.5])[:, None]
        at = np.arange(len(rows)), np.where(before, 0, -1)
        latents = wan_looks.beside(shots[numbers], data, before)
        given = np.zeros(latents.shape[:1] + latents.shape[2:3], bool)
        given[at] = True
        moved = np.zeros((*given.shape, 3), np.float32)
        moved[at] = rng.integers(-wan_looks.REACH, wan_looks.REACH + 1, (len(rows), 3)) * (0, 1, 1)
        moved[~elsewhere] = 0
        more = config.likeness_weight * (1 - index / config.likeness_steps)
        weight = 1 + more * wan_looks.beside(np.zeros_like(puppet[:, :1]), puppet, before, axis=1)
        texts = wan_looks.texts([(take,) for take in takes], bare, rng, config.drop_caption)
        return Batch(latents, texts, given, moved, weight=weight.astype(np.float32))

    return stages.train_flow(
        "likeness", wan_looks.trained(state, "aligned", config, device), config.likeness_steps, config.likeness_rate,
        draw, state, config, device, deadline, encoder,
    )


def moments(take: Take) -> list[Take]:
    """The take as each latent of its clip shows it, in the middle of its frames."""
    return [dataclasses.replace(take, phase=take.phase + frame / stages.FRAMES) for frame in _MIDDLES]


def velocity_errors(
    output: torch.Tensor, velocity: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean square errors [B] of clips [B, 16, T, h, w]: everywhere, and where the puppet is, weight [B, T, h, w]."""
    square = (output - velocity).square().mean(1)
    return square.mean((1, 2, 3)), (square * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def covered(take: Take, size: int) -> np.ndarray:
    """float32 [H/8, W/8] in 0..1: how much of each latent's place the puppet covers."""
    side, step = size // stages.whole_clip.STRIDE, stages.whole_clip.STRIDE
    mask = np.asarray(render.render(take, size).mask, np.float32)
    return mask.reshape(side, step, side, step).mean((1, 3))
