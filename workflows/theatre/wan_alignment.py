"""Representation alignment for the theatre's transformer (REPA, Yu et al., arXiv 2410.06940).

Tokens of a middle block have to tell, through a projection that is not kept, what the theatre's image encoder sees
in the clean picture at that place. What a part of a puppet is can then be found by content.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pack.nodes.fusion_embedding import encoding
from pack.nodes.puppets import vision
from torch import nn

_AT_ONCE = 64  # pictures


class Alignment:
    """The tokens of one block of a WanModel in its last forward pass, and how far they are from what is seen."""

    def __init__(self, dit, block: int, weight: float):
        inner, width = 2 * dit.dim, vision.VISION_CONFIG["hidden_size"]
        self.projection = nn.Sequential(
            nn.Linear(dit.dim, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, width)
        ).to(next(dit.parameters()).device)
        self.weight, self.tokens = weight, None
        dit.blocks[block].register_forward_hook(self._keep)

    def _keep(self, _block, _inputs, output) -> None:
        self.tokens = output

    def loss(self, seen: torch.Tensor) -> torch.Tensor:
        """Weighted 1 - cosine, of features [B, T, n, W]; frames of NaN are not known."""
        found = self.projection(self.tokens.float()).unflatten(1, seen.shape[1:3])
        known = seen.isfinite().all(-1)
        return self.weight * (1 - F.cosine_similarity(found[known], seen[known], dim=-1)).mean()


def features(drawn: Callable[[range], np.ndarray], count: int, side: int) -> np.ndarray:
    """fp16 [count, side * side, W]: the encoder's tokens of pictures uint8 [B, H, W, 3], on the transformer's grid.

    Each channel has mean 0 and deviation 1 over all of them, since cosines of raw tokens are all alike.
    """
    encoder, parts = vision.shipped(), []
    for start in range(0, count, _AT_ONCE):
        pictures = torch.from_numpy(drawn(range(start, min(start + _AT_ONCE, count)))).float() / 255
        with torch.no_grad():
            tokens = encoding.states(encoder, pictures)[:, 1:].mT
        square = tokens.unflatten(2, (int(tokens.shape[2] ** 0.5), -1))
        parts.append(F.interpolate(square, (side, side), mode="area").flatten(2).mT)
    found = torch.cat(parts)
    deviation, mean = torch.std_mean(found, (0, 1))
    return ((found - mean) / deviation).half().numpy()
