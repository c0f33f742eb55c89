"""What training an autoencoder for stills and one for video have in common."""

import math

import numpy as np
import torch

CELL = 8  # pixels a latent


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of pixels [B, 3, H, W] in 0..1: colours, and differences of neighbours.

    Ink lines are few pixels, and all of the drawing.
    """
    difference = output - target
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges


def corners(rng: np.random.Generator, count: int, size: int, crop: int) -> np.ndarray:
    """Tops and lefts, int [count, 2], of windows on the latent grid, nearer the middle than the rim."""
    # The mean of two uniform draws: a triangular density over the possible corners.
    return CELL * np.rint(rng.random((count, 2, 2)).mean(2) * (size - crop) / CELL).astype(int)


def decibels(errors: np.ndarray) -> float:
    """Peak signal-to-noise ratio of mean square errors, of a range of 1."""
    return -10 * math.log10(errors.mean())
