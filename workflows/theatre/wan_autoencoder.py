"""The video autoencoder as it is trained: ComfyUI's narrow Wan VAE, on frames first, on clips last."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import runner
import torch
import torch.nn.functional as F
import whole_clip
from autoencoding import CELL, corners, decibels, reconstruction_loss

DIM = 16  # channels at full size; Wan's own has 96
SHOWN = 12  # clips or frames on a sheet
_STAGES = ("frames", "clips")  # the later one goes on from the earlier


class WanAutoencoder(torch.nn.Module):
    """The VAE, and a linear readout of colour that makes latents easier to denoise and to preview."""

    def __init__(self, dim: int = DIM):
        super().__init__()
        self.vae = whole_clip.build(dim)
        self.colour = torch.nn.Conv3d(whole_clip.CHANNELS, 3, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 latents [B, 16, 1 + T/4, H/8, W/8] of pixels [B, 3, 1 + T, H, W] in -1..1."""
        return whole_clip.encode(self.vae, pixels).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 pixels, about in -1..1, of latents."""
        return whole_clip.decode(self.vae, latents).float()

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The training loss of pixels [B, 3, 1 + T, H, W]; `noise`, of the latents' shape, is added to these."""
        latent = self.encode(pixels)
        output = self.decode(latent + noise)
        mean, deviation = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
        # Near zero mean and unit deviation a channel while it trains; exact once they are measured.
        moments = mean.square().sum() + (deviation - 1).square().sum()
        colour = F.l1_loss(self.colour(latent).float(), mean_colours(pixels)) / 2
        output, target = ((x.transpose(1, 2) + 1) / 2 for x in (output, pixels))  # [B, T, 3, H, W] in 0..1
        motion = (output.diff(dim=1) - target.diff(dim=1)).abs().mean() if output.shape[1] > 1 else 0.0
        drawn = reconstruction_loss(output.flatten(0, 1), target.flatten(0, 1))
        return drawn + 0.5 * motion + 0.2 * colour + 0.01 * moments


def mean_colours(pixels: torch.Tensor) -> torch.Tensor:
    """The mean colour [B, 3, 1 + T/4, H/8, W/8] of the pixels that a latent stands for."""
    first = F.avg_pool3d(pixels[:, :, :1], (1, CELL, CELL))
    return torch.cat([first, F.avg_pool3d(pixels[:, :, 1:], (4, CELL, CELL))], 2) if pixels.shape[2] > 1 else first


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] to float [B, 3, T, H, W] in -1..1, the range of Wan's VAE."""
    tensor = torch.from_numpy(np.array(images)).movedim(-1, 1).float().div_(127.5).sub_(1)
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Float [B, 3, T, H, W] in -1..1 to uint8 [B, T, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()


def drawer(clips: np.ndarray, batch: int, crop: int, deviation: float) -> Callable:
    """draw(rng, step) -> (windows of whole clips uint8 [N, T, H, W, 3], noise) for `WanAutoencoder.forward`."""

    def draw(rng: np.random.Generator, _step: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = np.sort(rng.integers(0, len(clips), batch))
        places = corners(rng, batch, clips.shape[2], crop)
        windows = [clips[i, :, y : y + crop, x : x + crop] for i, (y, x) in zip(numbers, places, strict=True)]
        shape = (batch, whole_clip.CHANNELS, 1 + (clips.shape[1] - 1) // 4, crop // CELL, crop // CELL)
        return to_pixels(np.stack(windows)), deviation * torch.from_numpy(rng.standard_normal(shape, np.float32))

    return draw


def inspector(clips: np.ndarray) -> Callable:
    """inspect(autoencoder) -> (dB on held-out clips uint8 [N, T, H, W, 3], sheet: truth above, decoded below).

    Of each clip the sheet shows the last frame.
    """

    def inspect(autoencoder: WanAutoencoder) -> tuple[str, np.ndarray]:
        device = next(autoencoder.parameters()).device
        found = []
        for start in range(0, len(clips), 4):
            pixels = to_pixels(clips[start : start + 4]).to(device)
            found.append(to_images(autoencoder.decode(autoencoder.encode(pixels))))
        outputs = np.concatenate(found)
        errors = np.square((outputs.astype(np.float32) - clips) / 255).mean((1, 2, 3, 4))
        rows = [np.array(part[start : start + SHOWN, -1]) for start in (0, SHOWN) for part in (clips, outputs)]
        return f"{decibels(errors):.2f} dB", pictures.sheet([row for row in rows if len(row) == SHOWN])

    return inspect


def trained(folder: Path, device) -> WanAutoencoder:
    """The averaged autoencoder as far as it has been trained, frozen. Raises FileNotFoundError without a state."""
    autoencoder = WanAutoencoder()
    if not any(runner.trained(autoencoder, folder, name) for name in reversed(_STAGES)):
        raise FileNotFoundError(f"{folder} holds no trained autoencoder: run the stage `{_STAGES[0]}` first")
    return autoencoder.to(device).eval().requires_grad_(False)
