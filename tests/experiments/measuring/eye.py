"""The measuring net: what a picture shows, as parts, joints, action and who it is.

A body net on 64 x 64 pixels finds parts, joints and action; by its joints, the head and the shirt are cut
out upright and looked at more closely. Trained on renders only (train.py). It may say "reject": no clear
puppet, or no action that it knows. Its own error is in eye.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pack.nodes.puppets.config import ALL_ACTIONS, HEADWEAR, JOINTS, PART_NAMES, PATTERNS, SPECIES
from safetensors.torch import load_file
from torch import nn

from .data import to_tensor

FULL, SIZE, CROP = 128, 64, 32  # pixels of the picture, of what the body net sees, and of a closer look
REJECT = "reject"
ANSWERS = (*ALL_ACTIONS, REJECT)
WEIGHTS = Path(__file__).with_name("eye.safetensors")
FIGURES = Path(__file__).with_name("eye.json")


class Residual(nn.Module):
    """Two 3 x 3 convolutions on [B, C, H, W] beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def _down(before: int, after: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class Body(nn.Module):
    """A small U-Net for parts, joints and action. `forward` takes float [B, 3, 64, 64] in 0..1."""

    def __init__(self, widths: tuple[int, int, int, int] = (24, 48, 96, 128)):
        super().__init__()
        a, b, c, d = widths
        self.levels = nn.ModuleList(
            (
                nn.Sequential(_down(3, a), Residual(a)),  # 32 x 32
                nn.Sequential(_down(a, b), Residual(b)),  # 16 x 16
                nn.Sequential(_down(b, c), Residual(c), Residual(c)),  # 8 x 8
                nn.Sequential(_down(c, d), Residual(d)),  # 4 x 4
            )
        )
        self.lift = nn.ModuleList((nn.Conv2d(d, c, 1), nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)))
        self.join = nn.ModuleList((Residual(c), Residual(b), Residual(a)))
        self.parts = nn.Conv2d(a, 4 * len(PART_NAMES), 1)
        self.heat = nn.Conv2d(a, len(JOINTS), 1)
        self.squeeze = nn.Sequential(
            nn.Conv2d(d, 48, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 128), nn.ReLU()
        )
        self.action = nn.Sequential(
            nn.Linear(128 + 2 * len(JOINTS), 96), nn.ReLU(), nn.Linear(96, len(ANSWERS))
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """parts [B, P, 64, 64] and action as logits, joints [B, 18, 2] as fractions of the frame."""
        x, passed = (x - 0.5) * 2, []
        for level in self.levels:
            x = level(x)
            passed.append(x)
        deep = self.squeeze(x)
        for lift, join, skip in zip(self.lift, self.join, passed[-2::-1], strict=True):
            x = join(F.interpolate(lift(x), scale_factor=2.0) + skip)
        joints = soft_argmax(self.heat(x))
        about = torch.cat([deep, (joints - joints[:, 1:2]).flatten(1) * 4], 1)
        return {"parts": F.pixel_shuffle(self.parts(x), 2), "joints": joints, "action": self.action(about)}


class Closer(nn.Module):
    """A classifier of a crop that is turned upright: it cannot tell the action, so it cannot lean on it."""

    def __init__(self, answers: int):
        super().__init__()
        self.body = nn.Sequential(
            _down(3, 24),
            _down(24, 48),
            Residual(48),
            _down(48, 64),
            nn.Flatten(),
            nn.Linear(64 * (CROP // 8) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, answers),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Crops float [B, 3, 32, 32] in 0..1 to logits [B, answers]."""
        return self.body((x - 0.5) * 2)


class Eye(nn.Module):
    """The body first; then, with its joints, a closer look at the head and at the shirt."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = Closer(len(SPECIES) + len(HEADWEAR))
        self.shirt = Closer(len(PATTERNS))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures float [B, 3, 128, 128] in 0..1 to Body's answers and logits of the three classes."""
        small = F.interpolate(pictures, size=(SIZE, SIZE), mode="area")
        seen = self.body(small)
        species, headwear = self.head(head_crops(pictures, seen["joints"])).split(
            (len(SPECIES), len(HEADWEAR)), 1
        )
        pattern = self.shirt(shirt_crops(pictures, seen["joints"]))
        return {**seen, "species": species, "headwear": headwear, "pattern": pattern}


def _crops(pictures: torch.Tensor, centre: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Squares around `centre` [B, 2] that reach `across` [B, 2] to their right, fractions of the frame."""
    down = torch.stack([-across[:, 1], across[:, 0]], -1)
    matrix = torch.stack([2 * across, 2 * down, 2 * centre - 1], -1)
    grid = F.affine_grid(matrix, [len(pictures), 3, CROP, CROP], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def head_crops(pictures: torch.Tensor, joints: torch.Tensor) -> torch.Tensor:
    """The head with its ears and hat, upright: [B, 3, 32, 32]; joints [B, 18, 2] as fractions."""
    right, left = joints[:, JOINTS.index("r_ear")], joints[:, JOINTS.index("l_ear")]
    across = left - right
    across = across * (
        across.norm(dim=1, keepdim=True).clamp(0.15, 0.65) / (across.norm(dim=1, keepdim=True) + 1e-6)
    )
    up = torch.stack([across[:, 1], -across[:, 0]], -1)
    return _crops(pictures, (right + left) / 2 + 0.3 * up, across)


def shirt_crops(pictures: torch.Tensor, joints: torch.Tensor) -> torch.Tensor:
    """The torso from neck to hips, upright: [B, 3, 32, 32]; joints [B, 18, 2] as fractions."""
    neck = joints[:, JOINTS.index("neck")]
    spine = (joints[:, JOINTS.index("r_hip")] + joints[:, JOINTS.index("l_hip")]) / 2 - neck
    return _crops(pictures, neck + 0.52 * spine, 0.62 * torch.stack([spine[:, 1], -spine[:, 0]], -1))


def soft_argmax(heat: torch.Tensor) -> torch.Tensor:
    """The mean position under softmax(heat [B, J, H, W]): (x, y) [B, J, 2] as fractions of the frame."""
    height, width = heat.shape[-2:]
    weight = heat.float().flatten(2).softmax(-1).view(heat.shape)
    xs = (torch.arange(width, device=heat.device) + 0.5) / width
    ys = (torch.arange(height, device=heat.device) + 0.5) / height
    return torch.stack([(weight.sum(2) * xs).sum(-1), (weight.sum(3) * ys).sum(-1)], -1)


@dataclass
class Sight:
    """What the eye sees in N pictures of H x W pixels."""

    parts: np.ndarray  # uint8 [N, H, W], positions in PART_NAMES
    joints: np.ndarray  # float32 [N, 18, 2], pixels of the picture
    actions: list[str]  # from ANSWERS
    action_scores: np.ndarray  # float32 [N, len(ANSWERS)], probabilities
    species: list[str]
    patterns: list[str]
    headwear: list[str]


def load(path: Path = WEIGHTS) -> Eye:
    """The trained eye in fp32, ready to look. Raises FileNotFoundError where train.py has not been run."""
    eye = Eye()
    eye.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    )
    return eye.eval().requires_grad_(False)


@torch.no_grad()
def look(eye: Eye, images: np.ndarray, batch: int = 64) -> Sight:
    """What the pictures [N, H, H, 3] (uint8, or float in 0..1), H >= 64, show. Else ValueError."""
    images = np.asarray(images)
    if (
        images.ndim != 4
        or images.shape[3] != 3
        or images.shape[1] != images.shape[2]
        or images.shape[1] < SIZE
    ):
        raise ValueError(f"pictures of shape {images.shape}: give [N, H, H, 3] with H >= {SIZE}")
    size, found = images.shape[1], []
    for start in range(0, len(images), batch):
        pictures = to_tensor(images[start : start + batch])
        if size != FULL:
            mode = "area" if size > FULL else "bilinear"
            pictures = F.interpolate(pictures, size=(FULL, FULL), mode=mode)
        found.append(eye(pictures))
    seen = {key: torch.cat([f[key].float() for f in found]) for key in found[0]}
    parts = F.interpolate(seen["parts"], size=(size, size), mode="bilinear", align_corners=False).argmax(1)
    scores = seen["action"].softmax(-1)

    def named(key: str, names: tuple[str, ...]) -> list[str]:
        return [names[i] for i in seen[key].argmax(-1).tolist()]

    return Sight(
        parts.to(torch.uint8).numpy(),
        (seen["joints"] * size).numpy(),
        named("action", ANSWERS),
        scores.numpy(),
        named("species", SPECIES),
        named("pattern", PATTERNS),
        named("headwear", HEADWEAR),
    )
