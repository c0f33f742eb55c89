"""The stills' autoencoder as it is trained: TAESD with 16 latent channels, narrower where the picture is large."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import runner
import torch
import torch.nn.functional as F
from autoencoding import CELL, corners, decibels, reconstruction_loss
from comfy.taesd import taesd
from pack.nodes.puppets import theatre, world

WIDTHS = (16, 32, 64, 64)  # channels at full, half, quarter and eighth size; TAESD has 64 at all
CHECKED = 252  # held-out pictures, for the figures while it trains
SHOWN = 12  # of them in a row of a sheet
STAGES = ("autoencoder", "decoder")  # the later one goes on from the earlier, with its encoder


class NarrowTAESD(torch.nn.Module):
    """TAESD with `WIDTHS` channels: a third of the work of the original.

    `widened` fills the other channels with zeros, which gives ComfyUI's TAESD with exactly the same outputs.
    """

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS):
        super().__init__()
        block, conv, up = taesd.Block, taesd.conv, torch.nn.Upsample
        full, half, quarter, eighth = widths
        self.taesd_encoder = torch.nn.Sequential(
            conv(3, full), block(full, full),
            conv(full, half, stride=2, bias=False), *(block(half, half) for _ in range(3)),
            conv(half, quarter, stride=2, bias=False), *(block(quarter, quarter) for _ in range(3)),
            conv(quarter, eighth, stride=2, bias=False), *(block(eighth, eighth) for _ in range(3)),
            conv(eighth, theatre.LATENT_CHANNELS),
        )
        # Keeps colour linear in the latents, which is easier to denoise and to preview; not exported.
        self.colour = torch.nn.Conv2d(theatre.LATENT_CHANNELS, 3, 1)
        self.taesd_decoder = torch.nn.Sequential(
            taesd.Clamp(), conv(theatre.LATENT_CHANNELS, eighth), torch.nn.ReLU(),
            *(block(eighth, eighth) for _ in range(3)), up(scale_factor=2), conv(eighth, quarter, bias=False),
            *(block(quarter, quarter) for _ in range(3)), up(scale_factor=2), conv(quarter, half, bias=False),
            *(block(half, half) for _ in range(3)), up(scale_factor=2), conv(half, full, bias=False),
            block(full, full), conv(full, 3),
        )
        self.initialise()

    def initialise(self) -> None:
        """ComfyUI's layers come without initial values."""
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    torch.nn.init.zeros_(layer.bias)
            # Without normalisation layers a block learns fastest when it starts as the identity.
            if isinstance(layer, taesd.Block):
                layer.conv[-1].weight.data.mul_(0.1)
        self.taesd_encoder[-1].weight.data.mul_(0.05)  # latents of about unit deviation
        self.taesd_decoder[-1].weight.data.mul_(0.05)
        torch.nn.init.constant_(self.taesd_decoder[-1].bias, 0.5)  # mid grey

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 latents [B, 16, H/8, W/8] of pixels [B, 3, H, W] in 0..1."""
        return self.taesd_encoder(pixels).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """float32 pixels, about in 0..1, of latents."""
        return self.taesd_decoder(latents).float()

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The training loss of pixels [B, 3, H, W]; `noise` [B, 16, H/8, W/8] is added to their latents."""
        latent = self.encode(pixels)
        output = self.decode(latent + noise)
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        # Zero mean and unit deviation a channel, so that the denoiser needs no scale of its own.
        moments = mean.square().sum() + (deviation - 1).square().sum()
        colour = F.l1_loss(self.colour(latent).float(), F.avg_pool2d(pixels, CELL))
        return reconstruction_loss(output, pixels) + 0.2 * colour + 0.01 * moments

    def widened(self) -> taesd.TAESD:
        """ComfyUI's class, for the exported file."""
        full = taesd.TAESD(latent_channels=theatre.LATENT_CHANNELS)
        state = {key: torch.zeros_like(value) for key, value in full.state_dict().items()}
        state["vae_scale"] = torch.ones(())
        for key, value in self.state_dict().items():
            if not key.startswith("colour."):
                state[key][tuple(slice(size) for size in value.shape)] = value
        full.load_state_dict(state)
        return full


def drawer(images: np.ndarray, batch: int, crop: int, deviation: float) -> Callable:
    """draw(rng, step) -> (windows, noise) for `NarrowTAESD.forward`."""

    def draw(rng: np.random.Generator, _step: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = np.sort(rng.integers(0, len(images), batch))
        places = corners(rng, batch, images.shape[1], crop)
        windows = [images[i, y : y + crop, x : x + crop] for i, (y, x) in zip(numbers, places, strict=True)]
        shape = (batch, theatre.LATENT_CHANNELS, crop // CELL, crop // CELL)
        noise = deviation * torch.from_numpy(rng.standard_normal(shape, np.float32))
        return pictures.to_unit(np.stack(windows)), noise

    return draw


def inspector(images: np.ndarray) -> Callable:
    """inspect(autoencoder) -> (dB on held-out pictures, sheet of truth above and decoded below)."""

    def inspect(autoencoder: NarrowTAESD) -> tuple[str, np.ndarray]:
        device = next(autoencoder.parameters()).device
        targets = pictures.to_unit(images).to(device)
        outputs = torch.cat([autoencoder.decode(autoencoder.encode(part)).clamp(0, 1) for part in targets.split(16)])
        errors = (outputs - targets).square().mean((1, 2, 3)).cpu().numpy()
        near = np.arange(len(images)) % world.CLOSE_UP_EVERY == world.CLOSE_UP_EVERY - 1
        figures = f"{decibels(errors[~near]):.2f} dB full figures {decibels(errors[near]):.2f} dB close-ups"
        shown = np.concatenate([np.flatnonzero(~near)[: 2 * SHOWN], np.flatnonzero(near)[:SHOWN]])
        pairs = [(images[row], pictures.to_bytes(outputs[row])) for row in np.split(shown, 3)]
        return figures, pictures.sheet([row for pair in pairs for row in pair])

    return inspect


def trained(folder: Path, device) -> NarrowTAESD:
    """The averaged autoencoder as far as it has been trained, frozen. Raises FileNotFoundError without a state."""
    autoencoder = NarrowTAESD()
    if not any(runner.trained(autoencoder, folder, name) for name in reversed(STAGES)):
        raise FileNotFoundError(f"{folder} holds no trained autoencoder: run the stage `{STAGES[0]}` first")
    return autoencoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
