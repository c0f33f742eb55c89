"""Pictures that are no puppets, for the theatre's models, which know nothing else: told by their latents; without
ComfyUI.
"""

from typing import Any

import torch

# The puppets' model of pictures, by the name of its configuration.
PUPPETS = "PuppetsSD"
PUPPETS_ONLY = "these small models know puppets only"
FOR_PEOPLE = "for people open a template whose name begins with Real"
# Ours: its encoder gives what it has never seen a few large values among small ones. Of 66 renders, some of them
# scaled or as JPEG, the kurtosis of the channels is at most 7.7 and the largest value 4.4; 19 of 33 photographs are
# above one of these limits, and so is anybody in front of much black or white.
_PEAKED, _LARGE = 9.0, 6.0


def warnings(latent: torch.Tensor, name: str, config: Any) -> list[str]:
    """A line where latents [B, C, H, W] of the input `name` show no puppet, for the `config` of a puppets' model."""
    if type(config).__name__ != PUPPETS or latent.ndim != 4:
        return []
    values = latent.float().flatten(2)
    apart = values - values.mean(2, keepdim=True)
    peaked = apart.pow(4).mean((1, 2)) / apart.square().mean((1, 2)).square().clamp(min=1e-12) > _PEAKED
    found = [str(i + 1) for i, odd in enumerate((peaked | (values.abs().amax((1, 2)) > _LARGE)).tolist()) if odd]
    which = f" ({', '.join(found)} of {len(latent)})" if len(latent) > 1 else ""
    line = f"{name}{which} looks like no puppet, and {PUPPETS_ONLY}, so the result will not show it: {FOR_PEOPLE}"
    return [line] * bool(found)
