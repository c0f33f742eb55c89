"""The stages that train the theatre's Wan: autoencoder on pictures, then on clips, latents, transformer.

Every stage takes the folder of its state, so that a test can run two steps of each in a temporary one.
"""

import copy
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.ops
import numpy as np
import text_encoder
import torch
import torch.nn.functional as F
import whole_clip
from comfy.ldm.wan.model import WanModel
from pack.nodes.puppets import render, theatre, world
from pack.nodes.puppets.config import Take
from pack.nodes.training.session import host_in_training
from timeboxed import Optimiser, Stage, autocast, follow, pictures, reconstruction_loss
from wan_config import Config

FRAMES = 17  # one cycle of an action: 4n + 1
FIRST_CLIP = 1_000_000  # seed of the first clip, so that clips show other takes than the pictures
SECOND_TAKE = 500_000_000  # seed of the first clip's second puppet
GROUP_EVERY = 6  # clips, of which one has two puppets
PART = {"pictures": 2_000, "clips": 50}  # of the latents, a file
CHECKED_PICTURES, CHECKED_CLIPS = 64, 6  # of "validation", for the figures while it trains


def rng_for(config: Config, stage: str, step: int) -> np.random.Generator:
    """The random numbers of one step, the same whether the run was interrupted or not."""
    return np.random.default_rng([config.seed, sum(map(ord, stage)), step])


def clip_takes(index: int, split: str = "train") -> tuple[Take, ...]:
    """The take whose action clip `index` shows from its phase on; every sixth clip has a second one beside it."""
    first = world.sample_take(FIRST_CLIP + index, split)
    if index % GROUP_EVERY != GROUP_EVERY - 1:
        return (first,)
    others = (world.sample_take(SECOND_TAKE + index + turn, split) for turn in itertools.count(0, FIRST_CLIP))
    # Both do the same, and neither what its species is never shown to do.
    other = next(take for take in others if (take.identity.species, first.action) not in world.HELD_OUT_PAIRS)
    return first, dataclasses.replace(other, action=first.action, mirrored=first.mirrored)


def clip_frames(takes: Sequence[Take], size: int, frames: int = FRAMES) -> np.ndarray:
    """uint8 [frames, H, W, 3]: the first frames of the takes' cycle."""
    alone = len(takes) == 1
    clip = render.render_clip(takes[0], FRAMES, size) if alone else render.render_group_clip(takes, FRAMES, size)
    return np.stack([picture.image for picture in clip[:frames]])


def to_pixels(images: np.ndarray, device) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] to float [B, 3, T, H, W] in [-1, 1], the range of Wan's VAE."""
    tensor = torch.from_numpy(np.array(images)).to(device).movedim(-1, 1).float()
    return tensor.div(127.5).sub(1).contiguous(memory_format=torch.channels_last_3d)


def corner(rng: np.random.Generator, size: int, crop: int) -> tuple[int, int]:
    """Top and left of a window on the latent grid, nearer the middle than the rim."""
    # The mean of two uniform draws: a triangular density over the possible corners.
    top, left = np.rint(rng.random((2, 2)).mean(1) * (size - crop) / whole_clip.STRIDE).astype(int)
    return whole_clip.STRIDE * int(top), whole_clip.STRIDE * int(left)


# Autoencoder


def make_vae(config: Config, device) -> torch.nn.ModuleDict:
    """The autoencoder, and a linear readout of colour that makes latents easier to denoise and to preview."""
    torch.manual_seed(config.seed)
    readout = torch.nn.Conv3d(whole_clip.CHANNELS, 3, 1)
    return torch.nn.ModuleDict({"vae": whole_clip.build(config.vae_dim), "colour": readout}).to(device)


def _in_time(vae: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What single frames do not reach."""
    return [parameter for name, parameter in vae.named_parameters() if ".time_conv." in name]


def grouped(pixels: torch.Tensor) -> torch.Tensor:
    """The mean colour [B, 3, 1 + T/4, H/8, W/8] of the pixels that a latent stands for."""
    first = F.avg_pool3d(pixels[:, :, :1], (1, 8, 8))
    return torch.cat([first, F.avg_pool3d(pixels[:, :, 1:], (4, 8, 8))], 2) if pixels.shape[2] > 1 else first


def autoencoder_loss(modules: torch.nn.ModuleDict, pixels, rng, deviation: float, colour_weight: float):
    """Reconstruction through noisy latents, of single frames and of what moves between them."""
    device = pixels.device
    with autocast(device):
        latent = whole_clip.encode(modules["vae"], pixels).float()
        noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32)).to(device)
        output = whole_clip.decode(modules["vae"], latent + deviation * noise).float()
    mean, spread = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
    # Near zero mean and unit deviation a channel while it trains; exact once they are measured.
    moments = mean.square().sum() + (spread - 1).square().sum()
    colour = F.l1_loss(modules["colour"](latent), grouped(pixels)) / 2
    output, target = ((x.transpose(1, 2) + 1) / 2 for x in (output, pixels))  # [B, T, 3, H, W] in 0..1
    motion = (output.diff(dim=1) - target.diff(dim=1)).abs().mean() if output.shape[1] > 1 else 0.0
    drawn = reconstruction_loss(output.flatten(0, 1), target.flatten(0, 1))
    return drawn + 0.5 * motion + colour_weight * colour + 0.01 * moments


def psnr(vae, clips: Iterator[np.ndarray], device) -> float:
    """dB over uint8 [B, T, H, W, 3] batches, decoded without noise."""
    errors = []
    with torch.no_grad(), autocast(device):
        for images in clips:
            target = to_pixels(images, device)
            output = whole_clip.decode(vae, whole_clip.encode(vae, target)).float().clamp(-1, 1)
            errors.append(F.mse_loss(output, target).item() / 4)
    return -10 * math.log10(np.mean(errors))


def picture_psnr(vae, state: Path, config: Config, device) -> float:
    images = pictures(state, "validation", CHECKED_PICTURES, config.size)
    return psnr(vae, (images[i:i + 8][:, None] for i in range(0, len(images), 8)), device)


def clip_psnr(vae, config: Config, device) -> float:
    clips = [clip_frames(clip_takes(i, "validation"), config.size) for i in range(CHECKED_CLIPS)]
    return psnr(vae, (np.stack(clips[i:i + 2]) for i in range(0, len(clips), 2)), device)


def train_vae(state: Path, config: Config, device, deadline: float) -> bool:
    """On windows of single frames."""
    modules = make_vae(config, device)
    for parameter in _in_time(modules):
        parameter.requires_grad_(False)
    optimiser = Optimiser(modules, config.matrix_lr, config.vae_lr)
    stage = Stage(state / "vae.pt", optimiser, config.vae_steps, {"modules": modules}, deadline)
    images = pictures(state, "train", config.pictures, config.size)

    def step(index):
        rng, windows = rng_for(config, "vae", index), []
        for chosen in np.sort(rng.integers(0, len(images), config.vae_batch)):
            top, left = corner(rng, config.size, config.vae_crop)
            windows.append(images[chosen, top:top + config.vae_crop, left:left + config.vae_crop])
        pixels = to_pixels(np.stack(windows)[:, None], device)
        return autoencoder_loss(modules, pixels, rng, config.latent_noise, config.colour_weight)

    return stage.run(step, lambda: f"PSNR {picture_psnr(modules['vae'], state, config, device):.2f} dB")


def train_motion(state: Path, config: Config, device, deadline: float) -> bool:
    """The same autoencoder on windows of short clips, drawn anew in every step."""
    modules = trained_vae(state, config, device, ("vae",)).train().requires_grad_(True)
    for layer in (modules["vae"].conv1, modules["vae"].conv2):
        layer.requires_grad_(False)
    optimiser = Optimiser(modules, config.matrix_lr / 2, config.motion_lr)
    stage = Stage(state / "motion.pt", optimiser, config.motion_steps, {"modules": modules}, deadline)

    def step(index):
        rng, crop = rng_for(config, "motion", index), config.motion_crop
        windows = []
        for chosen in rng.integers(0, config.clips, config.motion_batch):
            frames = clip_frames(clip_takes(int(chosen)), config.size, config.motion_frames)
            top, left = corner(rng, config.size, crop)
            windows.append(frames[:, top:top + crop, left:left + crop])
        pixels = to_pixels(np.stack(windows), device)
        return autoencoder_loss(modules, pixels, rng, config.motion_noise, config.colour_weight)

    return stage.run(step, lambda: f"clip PSNR {clip_psnr(modules['vae'], config, device):.2f} dB")


def trained_vae(state: Path, config: Config, device, stages=("vae", "motion")) -> torch.nn.ModuleDict:
    """The autoencoder as far as it has been trained, frozen."""
    modules = make_vae(config, device)
    for name in stages:
        if (path := state / f"{name}.pt").exists():
            modules.load_state_dict(torch.load(path, map_location=device, weights_only=True)["modules"]["modules"])
    return modules.eval().requires_grad_(False)


# Latents


def _parts(state: Path, config: Config, kind: str) -> Iterator[tuple[Path, int, int]]:
    """(file, first, end) of the parts in which the latents of "pictures" or "clips" are kept."""
    count, folder = getattr(config, kind), state / f"latents_{config.size}"
    for start in range(0, count, PART[kind]):
        stop = min(start + PART[kind], count)
        yield folder / f"{kind}_{start:06}_{stop:06}.npy", start, stop


def encode_all(state: Path, config: Config, device, deadline: float) -> bool:
    """Latents of every picture and clip as the trained encoder gives them. True when all are there."""
    vae = None
    for kind in PART:
        for path, start, stop in _parts(state, config, kind):
            if path.exists():
                continue
            if time.monotonic() >= deadline:
                return False
            if vae is None:
                vae = trained_vae(state, config, device)["vae"]
            keep(path, _encoded(vae, state, config, kind, start, stop, device))
            print(f"latents of {kind} {stop}/{getattr(config, kind)}", flush=True)
    return True


def _encoded(vae, state: Path, config: Config, kind: str, start: int, stop: int, device) -> np.ndarray:
    images = pictures(state, "train", config.pictures, config.size) if kind == "pictures" else None
    batch = 2 if images is None else 32  # two clips rather than one, for the reason given at `motion_batch`
    found = []
    for first in range(start, stop, batch):
        chosen = range(first, min(first + batch, stop))
        if images is None:
            clips = np.stack([clip_frames(clip_takes(i), config.size) for i in chosen])
        else:
            clips = images[chosen.start:chosen.stop][:, None]
        with torch.no_grad(), autocast(device):
            found.append(whole_clip.encode(vae, to_pixels(clips, device)).to(torch.float16).cpu().numpy())
    return np.concatenate(found)


def keep(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, made first where it is not there."""
    if not path.exists():
        keep(path, make())
    return np.load(path)


def latents(state: Path, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """fp16 [pictures, 16, 1, H/8, W/8] and [clips, 16, 5, H/8, W/8], as the encoder gave them."""
    images, clips = (np.concatenate([np.load(path) for path, _, _ in _parts(state, config, kind)]) for kind in PART)
    return images, clips


def statistics(clips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [16] of every latent channel over clips."""
    values = np.moveaxis(clips[:1000], 1, 0).reshape(clips.shape[1], -1).astype(np.float64)
    return torch.from_numpy(values.mean(1)).float(), torch.from_numpy(values.std(1)).float()


# Transformer


def make_dit(config: Config, device) -> WanModel:
    """The host's class with the theatre's size, initialised as DiT's authors found best: gates nearly closed."""
    torch.manual_seed(config.seed)
    dit = WanModel(
        model_type="t2v", text_dim=theatre.TEXT_WIDTH, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32, device="cpu", **theatre.WAN_CONFIG,
    )
    for layer in dit.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.xavier_uniform_(layer.weight.data.flatten(1))
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm)) and layer.weight is not None:
            torch.nn.init.ones_(layer.weight)
            if getattr(layer, "bias", None) is not None:
                torch.nn.init.zeros_(layer.bias)
    for block in dit.blocks:
        torch.nn.init.zeros_(block.modulation)
        block.modulation.data[:, (2, 5)] = 0.1
        torch.nn.init.zeros_(block.cross_attn.o.weight)
    torch.nn.init.zeros_(dit.time_projection[1].weight)
    torch.nn.init.zeros_(dit.head.modulation)
    torch.nn.init.zeros_(dit.head.head.weight)
    return dit.to(device)


def noise_levels(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count] in 0..1, one from each equal part of the shifted schedule that sampling goes through."""
    even = (rng.permutation(count) + rng.random(count)) / count
    return (theatre.WAN_SHIFT * even / (1 + (theatre.WAN_SHIFT - 1) * even)).astype(np.float32)


def flow_loss(dit, clean, noise, sigma, context, moved=None, weight=None):
    """Flow matching: the velocity from latents to noise at clean + sigma * (noise - clean). All [B, 16, T, h, w].

    sigma is [B], or [B, T] where frames differ; those at 0 are given, not learnt. moved [B, T, 3] and
    weight [B, T, h, w] as in Batch.
    """
    level = (sigma[:, None] if sigma.ndim == 1 else sigma)[:, None, :, None, None]
    noisy = torch.lerp(clean, noise, level)
    with autocast(clean.device):
        if moved is None:
            output = dit(noisy, sigma * 1000, context=context).float()
        else:
            freqs = _moved_rotation(dit, noisy, moved)
            output = dit.forward_orig(noisy, sigma * 1000, context, freqs=freqs).float()
    learnt = (level > 0).expand_as(noise)
    if weight is None:
        return F.mse_loss(output[learnt], (noise - clean)[learnt])
    weight = weight[:, None].expand_as(noise)[learnt]
    return (weight * (output - (noise - clean))[learnt].square()).sum() / weight.sum()


def _moved_rotation(dit, noisy, moved):
    """The rotary embedding of latents [B, 16, T, h, w] whose frames are moved by [B, T, 3] patches of (t, h, w)."""
    _, rows, columns = dit.patch_size
    counts = noisy.shape[2], noisy.shape[3] // rows, noisy.shape[4] // columns
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in counts), indexing="ij"), -1)
    positions = places.to(noisy.device) + moved[:, :, None, None]
    return dit.rope_embedder(positions.flatten(1, 3)).movedim(1, 2)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step learns from: latents as encoded [B, 16, T, h, w], a text each, which frames are given, bool [B, T].

    moved: patches (t, h, w) by which a frame's rotary positions differ from their own, float32 [B, T, 3]. seen: as
    Alignment takes it. weight: of each place in the loss, float32 [B, T, h, w]. The texts are read last, after noise
    and levels, as they were when the first stages ran.
    """

    latents: np.ndarray
    texts: Iterable[str]
    given: np.ndarray
    moved: np.ndarray | None = None
    seen: np.ndarray | None = None
    weight: np.ndarray | None = None


def train_dit(state: Path, config: Config, device, deadline: float, encoder: Path) -> bool:
    """On single frames, then on clips; `encoder` is the checkpoint whose text encoder reads the captions."""
    images, clips = latents(state, config)

    def draw(rng: np.random.Generator, index: int) -> Batch:
        moving = index >= config.image_steps
        data = clips if moving else images
        chosen = rng.integers(0, len(data), config.clip_batch if moving else config.image_batch)
        takes = [clip_takes(int(i)) if moving else (world.sample_take(int(i), "train"),) for i in chosen]
        texts = (text_encoder.training_text(shown, rng, config.drop_caption) for shown in takes)
        return Batch(data[chosen], texts, np.zeros((len(chosen), data.shape[2]), bool))

    steps = config.image_steps + config.clip_steps
    return train_flow("dit", make_dit(config, device), steps, 1, draw, state, config, device, deadline, encoder)


def train_flow(
    name, dit, steps, rate, draw, state, config: Config, device, deadline: float, encoder: Path, alignment=None
) -> bool:
    """Learn from `draw(random numbers, step)` with the config's learning rates times `rate`."""
    average = copy.deepcopy(dit).requires_grad_(False)
    learnt = {"live": dit} if alignment is None else {"live": dit, "projection": alignment.projection}
    optimiser = Optimiser(torch.nn.ModuleDict(learnt), rate * config.matrix_lr, rate * config.dit_lr)
    stage = Stage(state / f"{name}.pt", optimiser, steps, {**learnt, "average": average}, deadline)
    if stage.done >= steps:
        return True
    text = text_encoder.trained(encoder, device)
    mean, deviation = (value[:, None, None, None].to(device) for value in statistics(latents(state, config)[1]))

    def step(index):
        rng = rng_for(config, name, index)
        follow(average, dit, index, config.ema)
        batch = draw(rng, index)
        clean = (torch.from_numpy(batch.latents).to(device).float() - mean) / deviation
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(device)
        sigma = torch.from_numpy(noise_levels(rng, len(clean))).to(device)
        if batch.given.any():
            sigma = sigma[:, None].masked_fill(torch.from_numpy(batch.given).to(device), 0)
        with torch.no_grad():
            context = text(text_encoder.tokens(list(batch.texts), device)).last_hidden_state
        moved, weight = (None if x is None else torch.from_numpy(x).to(device) for x in (batch.moved, batch.weight))
        loss = flow_loss(dit, clean, noise, sigma, context, moved, weight)
        return loss if batch.seen is None else loss + alignment.loss(torch.from_numpy(batch.seen).to(device))

    with host_in_training():
        return stage.run(step)
