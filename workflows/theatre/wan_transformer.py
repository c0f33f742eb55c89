"""The video model as it is trained: ComfyUI's Wan on latents of close-ups, by flow matching."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.ops
import numpy as np
import pictures
import runner
import text_encoder
import torch
import wan_autoencoder
import whole_clip
from comfy.ldm.wan.model import WanModel
from pack.nodes.puppets import captions, theatre, world
from pack.nodes.puppets.config import Take
from sd_unet import explicit_attention

OUTER = ("head.head.",)  # the last layer; the first is called an embedding
FRAMES = 9  # 4n + 1
CYCLE = 16  # frames in a cycle of an action: 9 of them show half of it, and nothing jumps
FIRST_CLIP = 1_000_000  # seed of the first clip, so that clips show other takes than the single frames
SHOWN = 8  # clips of each split on a sheet
_ENCODED_AT_ONCE = 32  # frames, or clips at a ninth


def frame_take(index: int, split: str = "train") -> Take:
    """The take of single frame `index`: a close-up, as all that the video model sees."""
    return world.sample_take(index, split, "close_up")


def clip_take(index: int, split: str = "train") -> Take:
    """The take whose action clip `index` shows from its phase on."""
    return frame_take(FIRST_CLIP + index, split)


def draw_frame(take: Take, size: int) -> np.ndarray:
    """uint8 [1, H, W, 3]: a clip of one frame."""
    return pictures.draw_still(take, size)[None]


def draw_clip(take: Take, size: int) -> np.ndarray:
    """uint8 [9, H, W, 3]: the first frames of a cycle of 16."""
    return np.stack([pictures.draw_moment(take, i / CYCLE, size) for i in range(FRAMES)])


def rendered(folder: Path, kind: str, split: str, count: int, size: int) -> np.ndarray:
    """uint8 [count, T, H, W, 3] of "frames" (T = 1) or "clips" (T = 9), kept in `folder`."""
    take, draw = {"frames": (frame_take, draw_frame), "clips": (clip_take, draw_clip)}[kind]
    path = folder / f"{kind}_{split}_{count}_{size}.npy"
    return pictures.rendered(path, functools.partial(take, split=split), count, size, draw)


def latents(folder: Path, images: np.ndarray, kind: str) -> np.ndarray:
    """float16 [N, 16, 1 + T/4, H/8, W/8] of training frames or clips, as the trained autoencoder gives them."""
    at_once, accelerator = max(2, _ENCODED_AT_ONCE // images.shape[1]), runner.make_accelerator()

    def encode() -> np.ndarray:
        autoencoder, parts = wan_autoencoder.trained(folder, accelerator.device), []
        for start in range(0, len(images), at_once):
            pixels = wan_autoencoder.to_pixels(images[start : start + at_once]).to(accelerator.device)
            parts.append(autoencoder.encode(pixels).to(torch.float16).cpu().numpy())
        return np.concatenate(parts)

    with torch.no_grad(), accelerator.autocast():
        return np.array(pictures.kept(folder / f"latents_{kind}_{len(images)}.npy", encode))


def statistics(clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, float32 [16], of every latent channel over clips."""
    values = np.moveaxis(clips[:1000], 1, 0).reshape(clips.shape[1], -1).astype(np.float64)
    return torch.from_numpy(values.mean(1)).float(), torch.from_numpy(values.std(1)).float()


def make_transformer() -> WanModel:
    """ComfyUI's class with the theatre's size, initialised as DiT's authors found best: gates nearly closed."""
    transformer = WanModel(
        model_type="t2v", text_dim=theatre.TEXT_WIDTH, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32, device="cpu", **theatre.WAN_CONFIG,
    )
    for layer in transformer.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.xavier_uniform_(layer.weight.data.flatten(1))
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm)) and layer.weight is not None:
            torch.nn.init.ones_(layer.weight)
            if getattr(layer, "bias", None) is not None:
                torch.nn.init.zeros_(layer.bias)
    for block in transformer.blocks:
        torch.nn.init.zeros_(block.modulation)
        block.modulation.data[:, (2, 5)] = 0.1
        torch.nn.init.zeros_(block.cross_attn.o.weight)
    torch.nn.init.zeros_(transformer.time_projection[1].weight)
    torch.nn.init.zeros_(transformer.head.modulation)
    torch.nn.init.zeros_(transformer.head.head.weight)
    return transformer


class VideoDenoiser(torch.nn.Module):
    """The transformer beside the frozen text encoder of `puppets_sd`."""

    def __init__(self, text: torch.nn.Module):
        super().__init__()
        self.transformer, self.text = make_transformer(), text

    def predict(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The velocity, float32 [B, 16, T, h, w], at sigma [B] in 0..1 of captions [B, 40]."""
        with torch.no_grad():
            context = self.text(tokens).last_hidden_state
        on_cpu = noisy.device.type == "cpu"
        options = {"optimized_attention_override": explicit_attention} if on_cpu else {}
        return self.transformer(noisy, sigma * 1000, context=context, transformer_options=options).float()

    def forward(self, clean, noise, sigma, tokens) -> torch.Tensor:
        """Flow matching: the velocity from latents to noise at clean + sigma * (noise - clean)."""
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        return (self.predict(noisy, sigma, tokens) - (noise - clean)).square().mean()


def noise_levels(rng: np.random.Generator, count: int) -> torch.Tensor:
    """float32 [count] in 0..1, one from each equal part of the shifted schedule that sampling goes through."""
    even = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy((theatre.WAN_SHIFT * even / (1 + (theatre.WAN_SHIFT - 1) * even)).astype(np.float32))


def drawer(
    data: dict[str, np.ndarray], batches: dict[str, int], drop_clause: float, bare: float, drop_caption: float
) -> Callable:
    """draw(rng, step) -> the arguments of `VideoDenoiser.forward`: clips, then single frames, by turns.

    `data` holds normalised latents. `bare` is the share of captions without clothes, beside those that lose them
    clause by clause: a prompt without clothes has to give a clean, undecided puppet.
    """
    takes = {"frames": frame_take, "clips": clip_take}

    def draw(rng: np.random.Generator, step: int) -> tuple[torch.Tensor, ...]:
        kind = ("clips", "frames")[step % 2]
        chosen = rng.integers(0, len(data[kind]), batches[kind])
        clean = torch.from_numpy(data[kind][chosen]).float()
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        texts = [
            text_encoder.training_text(takes[kind](int(i)), rng, drop_caption, drop_clause, bare) for i in chosen
        ]
        return clean, noise, noise_levels(rng, len(chosen)), text_encoder.tokens(texts)

    return draw


def normalised(data: np.ndarray, mean: torch.Tensor, deviation: torch.Tensor) -> np.ndarray:
    """float16 latents [N, 16, T, h, w] of zero mean and unit deviation a channel."""
    shape = (1, -1, 1, 1, 1)
    return ((data - mean.numpy().reshape(shape)) / deviation.numpy().reshape(shape)).astype(np.float16)


def sample(
    denoiser: VideoDenoiser, texts: Sequence[str], frames: int, cells: int, seed: int, steps: int = 20,
    guidance: float = 3.0,
) -> torch.Tensor:
    """Normalised latents [B, 16, 1 + frames/4, cells, cells] from texts alone, by Euler's method with guidance."""
    device = next(denoiser.parameters()).device
    even = torch.linspace(1, 0, steps + 1)
    levels = (theatre.WAN_SHIFT * even / (1 + (theatre.WAN_SHIFT - 1) * even)).to(device)
    tokens = text_encoder.tokens([*texts, *[""] * len(texts)]).to(device)
    shape = (len(texts), whole_clip.CHANNELS, 1 + frames // 4, cells, cells)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        said, unsaid = denoiser.predict(latent.repeat(2, 1, 1, 1, 1), level.expand(2 * len(texts)), tokens).chunk(2)
        latent = latent + (following - level) * (unsaid + guidance * (said - unsaid))
    return latent


def inspector(folder: Path, size: int, mean: torch.Tensor, deviation: torch.Tensor) -> Callable:
    """inspect(denoiser) -> (nothing, sheet: three frames of each true clip, then of what its caption alone gave).

    Left are pairs of species and action that training shows too, right those held out.
    """
    takes = [clip_take(i, split) for i in range(SHOWN) for split in ("validation", "unseen")]
    truth = [draw_clip(take, size) for take in takes]
    texts = [captions.caption(take) for take in takes]

    def inspect(denoiser: VideoDenoiser) -> tuple[str, np.ndarray]:
        device = next(denoiser.parameters()).device
        autoencoder = wan_autoencoder.trained(folder, device)
        latent = sample(denoiser, texts, FRAMES, size // whole_clip.STRIDE, seed=0)
        shape = (1, -1, 1, 1, 1)
        latent = latent * deviation.view(shape).to(device) + mean.view(shape).to(device)
        drawn = wan_autoencoder.to_images(autoencoder.decode(latent))
        cells = [np.concatenate([true[::4], made[::4]]) for true, made in zip(truth, drawn, strict=True)]
        return "", pictures.sheet([np.concatenate(cells[i : i + 2]) for i in range(0, len(cells), 2)])

    return inspect
