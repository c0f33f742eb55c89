"""Pictures that are no puppets, for the theatre's models, which know nothing else: told by their latents, or by
their own pixels; without ComfyUI.
"""

from typing import Any

import torch
import torch.nn.functional as F

# The puppets' models of pictures and of videos, by the names of their configurations.
PUPPETS, PUPPETS_VIDEO = "PuppetsSD", "PuppetsWan"
PUPPETS_ONLY = "these small models know puppets only"
FOR_PEOPLE = "for people open a template whose name begins with Real"
# Ours: its encoder gives what it has never seen a few large values among small ones. Of 66 renders, some of them
# scaled or as JPEG, the kurtosis of the channels is at most 7.7 and the largest value 4.4; 19 of 33 photographs are
# above one of these limits, and so is anybody in front of much black or white.
_PEAKED, _LARGE = 9.0, 6.0


# What the theatre's image encoder says of itself.
_VISION = {"hidden_size": 128, "image_size": 64}
_SIDE = 128  # pixels
# Ours: the mean edge by the root of the mean square, so how evenly edges are spread. Paper has few and sharp ones:
# of 56 renders, also scaled or as JPEG, at most 0.547, and of some twenty drawings by the models at most 0.553; 25 of
# 45 photographs and pictures of large models are above the limit, which was chosen on these pictures.
_EVEN = 0.57
# Ours, of latents of the video's VAE. The mean of this channel: of 56 renders -1.10 to 0.96. The mean square of the
# Laplacian by the variance: 16.3 and more. How evenly edges are spread: at most 0.965. 35 of the 45 are outside
# the limits, also chosen on these.
_CHANNEL, _MEANS, _DETAIL, _EVEN_LATENTS = 3, (-1.4, 1.3), 15.0, 0.975


def warnings(latent: torch.Tensor, name: str, config: Any) -> list[str]:
    """A line where latents of the input `name` show no puppet, for the `config` of a puppets' model: [B, C, H, W], or
    [B, C, T, H, W] for its video model.
    """
    kind = type(config).__name__, latent.ndim
    if kind == (PUPPETS, 4):
        return _line(name, _unlike_a_picture(latent.float()))
    if kind == (PUPPETS_VIDEO, 5) and latent.shape[1] > _CHANNEL:
        return _line(name, _unlike_a_frame(latent[:, :, 0].float()))
    return []


def _unlike_a_picture(latent: torch.Tensor) -> torch.Tensor:
    values = latent.flatten(2)
    apart = values - values.mean(2, keepdim=True)
    peaked = apart.pow(4).mean((1, 2)) / apart.square().mean((1, 2)).square().clamp(min=1e-12) > _PEAKED
    return peaked | (values.abs().amax((1, 2)) > _LARGE)


def _unlike_a_frame(latent: torch.Tensor) -> torch.Tensor:
    middle = latent[..., 1:-1, 1:-1]
    beside = latent[..., :-2, 1:-1] + latent[..., 2:, 1:-1] + latent[..., 1:-1, :-2] + latent[..., 1:-1, 2:]
    spread = latent.var((2, 3), correction=0).sum(1).clamp(min=1e-12)
    detail = (4 * middle - beside).square().sum(1).mean((1, 2)) / spread
    mean = latent[:, _CHANNEL].mean((1, 2))
    low, high = _MEANS
    return (mean < low) | (mean > high) | (detail < _DETAIL) | (_evenness(latent) > _EVEN_LATENTS)


def _evenness(planes: torch.Tensor) -> torch.Tensor:
    """How evenly edges are spread over [B, C, H, W], [B]: 1 where they are equal everywhere."""
    down, across = planes[..., 1:, :-1] - planes[..., :-1, :-1], planes[..., :-1, 1:] - planes[..., :-1, :-1]
    edges = (down.square() + across.square()).sum(1).sqrt().flatten(1)
    return edges.mean(1) / edges.square().mean(1).sqrt().clamp(min=1e-6)


def of_pictures(pictures: torch.Tensor, name: str, clip_vision: Any) -> list[str]:
    """A line where pictures [B, H, W, 3] of the input `name` show no puppet, for the theatre's image encoder."""
    described = getattr(clip_vision, "config", {})
    if any(described.get(key) != value for key, value in _VISION.items()):
        return []
    small = F.interpolate(pictures[..., :3].movedim(-1, 1).float(), (_SIDE, _SIDE), mode="area")
    return _line(name, _evenness(small) > _EVEN)


def _line(name: str, strangers: torch.Tensor) -> list[str]:
    found = [str(i + 1) for i, odd in enumerate(strangers.tolist()) if odd]
    which = f" ({', '.join(found)} of {len(strangers)})" if len(strangers) > 1 else ""
    # What to do comes first: a node shows two lines, and the rest when one scrolls.
    return [f"{name}{which} looks like no puppet: {FOR_PEOPLE}, since {PUPPETS_ONLY}"] * bool(found)
