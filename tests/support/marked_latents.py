"""Latents whose values say which picture, clip or shot they are, so that a test can tell what was drawn."""

import numpy as np

ALONE = [0, 1, 2, 3, 4, 6]  # the first six clips of one puppet
PICTURE, CLIP, SHOT = 0, 100, 200  # the offset of each kind's numbers


def marked(kind: int, count: int, frames: int) -> np.ndarray:
    """Latents filled with their own number, [count, 16, frames, 4, 4]."""
    numbers = kind + np.arange(count, dtype=np.float32)
    return np.broadcast_to(numbers[:, None, None, None, None], (count, 16, frames, 4, 4))
