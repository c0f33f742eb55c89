"""The stills' denoiser and its text encoder as they are trained: ComfyUI's UNet on latents of the autoencoder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import autoencoding
import comfy.ops
import numpy as np
import pictures
import runner
import sd_autoencoder
import text_encoder
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from pack.nodes.puppets import captions, theatre, world
from pack.nodes.puppets.config import Take

# Left to AdamW: the first and the last layer, and feed-forwards, whose gates Muon's full-sized first steps close.
OUTER = ("input_blocks.0.0.", "unet.out.", ".ff.")
DEAD = 0.01  # of the mean size of what a feed-forward's gates let through; live ones have 0.1 to 0.3
SHOWN = 12  # pictures of each split on a sheet
_ENCODED_AT_ONCE = 64


def schedule() -> DDIMScheduler:
    """SD 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )


def make_unet() -> UNetModel:
    """ComfyUI's class with the theatre's size, initialised."""
    unet = UNetModel(
        image_size=32, in_channels=theatre.LATENT_CHANNELS, out_channels=theatre.LATENT_CHANNELS,
        num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_output=[1] * 4, transformer_depth_middle=1,
        use_spatial_transformer=True, legacy=False, operations=comfy.ops.disable_weight_init,
        **theatre.UNET_CONFIG, **theatre.PuppetsSD.unet_extra_config,
    )
    # PyTorch's own initialisation, which ComfyUI's layers skip; residual branches start at zero, as in LDM.
    for layer in unet.modules():
        for kind in (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    for name, layer in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return unet


def explicit_attention(_comfy_function, q, k, v, heads, *_args, **_options):
    """Softmax attention [B, N, heads * d] as written; ComfyUI calls it in place of its own while we train.

    With its backward pass 1.5 times as fast as PyTorch's flash attention on a CPU, at 256 tokens and in bf16.
    """
    batch, tokens, width = q.shape
    q, k, v = (part.view(batch, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v))
    weights = (q * (width // heads) ** -0.5 @ k.mT).softmax(-1, dtype=q.dtype)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, width)


class Denoiser(torch.nn.Module):
    """UNet and text encoder, which learn together."""

    def __init__(self, min_snr: float):
        super().__init__()
        self.unet, self.text = make_unet(), text_encoder.make_text_encoder()
        self.min_snr, self.schedule = min_snr, schedule()

    def predict(self, noisy: torch.Tensor, moments: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The noise, float32 [B, 16, h, w], in latents at moments 0 to 999, int64 [B], of captions [B, 40]."""
        context = self.text(tokens).last_hidden_state
        explicit = explicit_attention if noisy.device.type == "cpu" else None
        options = {"optimized_attention_override": explicit} if explicit else {}
        return self.unet(noisy, moments.float(), context=context, transformer_options=options).float()

    def forward(self, clean, noise, moments, tokens) -> torch.Tensor:
        """The training loss, weighted by min-SNR (Hang et al. 2023) for predicted noise."""
        noisy = self.schedule.add_noise(clean, noise, moments)
        error = (self.predict(noisy, moments, tokens) - noise).square().mean((1, 2, 3))
        snr = compute_snr(self.schedule, moments)
        return (error * snr.clamp(max=self.min_snr) / snr).mean()


def revive(denoiser: Denoiser, clean, noise, moments, tokens) -> list[str]:
    """Start the feed-forward layers anew whose gates are closed nearly wherever the batch looks; their names.

    Hardly a gradient reaches such a layer. It goes on giving its constant, and learns from there.
    """
    passed: dict[torch.nn.Module, float] = {}

    def record(gated, _inputs, output):
        passed[gated] = output.abs().mean().item()

    forwards = {name: part for name, part in denoiser.unet.named_modules() if name.endswith(".ff")}
    hooks = [part.net[0].register_forward_hook(record) for part in forwards.values()]
    with torch.no_grad():
        denoiser(clean, noise, moments, tokens)
    for hook in hooks:
        hook.remove()
    dead = [name for name, part in forwards.items() if passed[part.net[0]] < DEAD]
    for name in dead:
        torch.nn.Linear.reset_parameters(forwards[name].net[0].proj)
        torch.nn.LayerNorm.reset_parameters(denoiser.unet.get_submodule(name.removesuffix("ff") + "norm3"))
        torch.nn.init.zeros_(forwards[name].net[2].weight)
    return dead


def latents(folder: Path, images: np.ndarray) -> np.ndarray:
    """float16 [N, 16, H/8, W/8] of the training pictures, encoded once with the trained autoencoder."""
    accelerator = runner.make_accelerator()

    def encode() -> np.ndarray:
        autoencoder, parts = sd_autoencoder.trained(folder, accelerator.device), []
        for start in range(0, len(images), _ENCODED_AT_ONCE):
            pixels = pictures.to_unit(images[start : start + _ENCODED_AT_ONCE]).to(accelerator.device)
            parts.append(autoencoder.encode(pixels).to(torch.float16).cpu().numpy())
        return np.concatenate(parts)

    with torch.no_grad(), accelerator.autocast():
        return np.array(pictures.kept(folder / f"latents_{len(images)}.npy", encode))


def drawer(data: np.ndarray, takes: Sequence[Take], batch: int, drop_caption: float) -> Callable:
    """draw(rng, step) -> the arguments of `Denoiser.forward`."""

    def draw(rng: np.random.Generator, _step: int) -> tuple[torch.Tensor, ...]:
        chosen = rng.integers(0, len(data), batch)
        clean = torch.from_numpy(data[chosen]).float()
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        moments = torch.from_numpy(rng.integers(0, 1000, batch))
        texts = [text_encoder.training_text(takes[i], rng, drop_caption) for i in chosen]
        return clean, noise, moments, text_encoder.tokens(texts)

    return draw


def sample(denoiser: Denoiser, texts: Sequence[str], size: int, seed: int, steps: int = 20, guidance: float = 4.0):
    """Latents [B, 16, size, size] drawn from texts alone, by DDIM with classifier-free guidance."""
    device = next(denoiser.parameters()).device
    plan = schedule()
    plan.set_timesteps(steps, device=device)
    tokens = text_encoder.tokens([*texts, *[""] * len(texts)]).to(device)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(texts), theatre.LATENT_CHANNELS, size, size, generator=generator).to(device)
    for moment in plan.timesteps:
        both = denoiser.predict(latent.repeat(2, 1, 1, 1), moment.expand(2 * len(texts)), tokens)
        said, unsaid = both.chunk(2)
        latent = plan.step(unsaid + guidance * (said - unsaid), moment, latent).prev_sample
    return latent


def inspector(folder: Path, size: int) -> Callable:
    """inspect(denoiser) -> (nothing, sheet of renders above and what their captions alone gave below).

    The first row shows pairs of species and action that training shows too, the second those held out.
    """
    shown = [[world.still_take(i, split) for i in range(SHOWN)] for split in ("validation", "unseen")]
    truth = [np.stack([pictures.draw_still(take, size) for take in row]) for row in shown]
    texts = [captions.caption(take) for row in shown for take in row]

    def inspect(denoiser: Denoiser) -> tuple[str, np.ndarray]:
        autoencoder = sd_autoencoder.trained(folder, next(denoiser.parameters()).device)
        latent = sample(denoiser, texts, size // autoencoding.CELL, seed=0)
        drawn = np.split(pictures.to_bytes(autoencoder.decode(latent)), 2)
        return "", pictures.sheet([truth[0], drawn[0], truth[1], drawn[1]])

    return inspect
