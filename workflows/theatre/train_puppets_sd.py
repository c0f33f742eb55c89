"""Trains the puppet theatre's tiny Stable Diffusion and writes `checkpoints/puppets_sd.safetensors`.

    python workflows/theatre/train_puppets_sd.py                 # every stage to its end, resuming what is there
    python workflows/theatre/train_puppets_sd.py --minutes 20    # stop (and save) after 20 minutes; call again
    python workflows/theatre/train_puppets_sd.py --stage export  # write the checkpoint from what has been trained

Stages: `vae` (autoencoder), `unet` (denoiser and text encoder on its latents), `decoder` (the decoder alone, on
slightly noisy latents), `export`. Seeded by step number: the same steps give the same data order whether the
run was interrupted or not. Runs on a GPU where there is one, else on the CPU, in bf16 autocast where
the processor has it. State lives under
`.cache/training/puppets_sd`.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cache" / "training" / "puppets_sd"
sys.path.insert(0, str(ROOT / "workflows"))
from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

scripts.add_comfy_path(STATE / "host", cpu=not torch.cuda.is_available())
from comfy.cli_args import args as host_options  # noqa: E402

host_options.use_pytorch_cross_attention = True
import comfy.ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import Block  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402
from narrow_taesd import NarrowTAESD  # noqa: E402
from pack.nodes.puppets import theatre, world  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from text_encoder import make_text_encoder, text_prefix, tokens, training_text  # noqa: E402
from timeboxed import Optimiser, Stage, autocast, reconstruction_loss, to_tensor  # noqa: E402
from timeboxed import pictures as render_pictures  # noqa: E402

CHECKPOINT = ROOT / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"


@dataclasses.dataclass(frozen=True)
class Config:
    pictures: int = 16_000
    size: int = 128  # pixels
    seed: int = 7
    matrix_lr: float = 0.02  # Muon's own scale; the rates below are AdamW's
    vae_steps: int = 4_000
    vae_batch: int = 8
    vae_crop: int = 64  # pixels; crops spend the steps on the puppet, not on the sky
    vae_lr: float = 2e-3
    latent_noise: float = 0.03  # deviation added before decoding; more costs detail
    colour_weight: float = 0.2  # of the linear readout below
    unet_steps: int = 2_500
    unet_batch: int = 32
    unet_lr: float = 6e-4
    ema: float = 0.998
    min_snr: float = 5.0
    drop_caption: float = 0.1
    warm_start: int = 0  # 1 begins with the weights of the checkpoint beside this file
    decoder_steps: int = 600
    decoder_noise: float = 0.08  # deviation, against the denoiser's own errors


def initialise(module) -> None:
    """PyTorch's own initialisation: the host's layers skip it. Residual branches start at zero, as in LDM."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(layer)
        elif isinstance(layer, torch.nn.Linear):
            torch.nn.Linear.reset_parameters(layer)
        elif isinstance(layer, torch.nn.GroupNorm):
            torch.nn.GroupNorm.reset_parameters(layer)
        elif isinstance(layer, torch.nn.LayerNorm):
            torch.nn.LayerNorm.reset_parameters(layer)
    for name, layer in module.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)


def from_checkpoint(module, prefix: str) -> None:
    """Copy what the shipped checkpoint holds under `prefix`; a narrower tensor takes the leading channels."""
    stored = load_file(CHECKPOINT)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if prefix + name in stored:
                parameter.copy_(stored[prefix + name][tuple(slice(size) for size in parameter.shape)])


def make_vae(device):
    vae = NarrowTAESD()
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        # Without normalisation layers a block learns fastest when it starts as the identity.
        if isinstance(layer, Block):
            layer.conv[-1].weight.data.mul_(0.1)
    vae.taesd_encoder[-1].weight.data.mul_(0.05)  # latents of about unit deviation
    vae.taesd_decoder[-1].weight.data.mul_(0.05)
    torch.nn.init.constant_(vae.taesd_decoder[-1].bias, 0.5)  # mid grey
    return vae.to(device).to(memory_format=torch.channels_last)


def make_unet(device):
    unet = UNetModel(
        image_size=32, in_channels=theatre.LATENT_CHANNELS, out_channels=theatre.LATENT_CHANNELS,
        num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 1], transformer_depth_output=[1] * 4, transformer_depth_middle=1,
        use_spatial_transformer=True, legacy=False, operations=comfy.ops.disable_weight_init,
        **theatre.UNET_CONFIG, **theatre.PuppetsSD.unet_extra_config,
    )
    initialise(unet)
    return unet.to(device)


def alphas_cumprod(device):
    """SD 1.5's scaled-linear schedule, [1000]."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def pictures(config, split: str, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]."""
    return render_pictures(STATE, split, count, config.size)


def rng_for(config: Config, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, sum(map(ord, stage)), step])


def crops(images, rng, config, data=None):
    """Random windows aligned to the latent grid, nearer the middle than the rim: pictures [B, c, c, 3], latents."""
    size, cells, batch = config.vae_crop, config.size // 8, config.vae_batch
    chosen = np.sort(rng.integers(0, len(images), batch))
    # The mean of two uniform draws: a triangular density over the possible corners.
    corners = np.rint(rng.random((batch, 2, 2)).mean(2) * (cells - size // 8)).astype(int)
    windows = [images[i, 8 * y:8 * y + size, 8 * x:8 * x + size] for i, (y, x) in zip(chosen, corners)]
    if data is None:
        return np.stack(windows), None
    latents = [data[i, :, y:y + size // 8, x:x + size // 8] for i, (y, x) in zip(chosen, corners)]
    return np.stack(windows), np.stack(latents)


def psnr(vae, config, device, count=256) -> float:
    """dB over held-out takes, decoded without noise."""
    images = pictures(config, "validation", count)
    errors = []
    with torch.no_grad(), autocast(device):
        for i in range(0, count, 16):
            target = to_tensor(images[i:i + 16], device)
            output = vae.taesd_decoder(vae.taesd_encoder(target)).float().clamp(0, 1)
            errors.append(F.mse_loss(output, target).item())
    return -10 * math.log10(np.mean(errors))


def train_vae(config, device, deadline) -> bool:
    vae = make_vae(device)
    if config.warm_start:
        from_checkpoint(vae, "first_stage_model.")
    optimiser = Optimiser(vae, config.matrix_lr, config.vae_lr)
    stage = Stage(STATE / "vae.pt", optimiser, config.vae_steps, {"vae": vae}, deadline)
    images = pictures(config, "train", config.pictures)

    def step(index):
        rng = rng_for(config, "vae", index)
        target = to_tensor(crops(images, rng, config)[0], device)
        shape = (len(target), theatre.LATENT_CHANNELS, target.shape[2] // 8, target.shape[3] // 8)
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
        with autocast(device):
            latent = vae.taesd_encoder(target).float()
            output = vae.taesd_decoder(latent + config.latent_noise * noise.to(device)).float()
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        # Zero mean and unit deviation a channel, so that the denoiser needs no scale of its own.
        moments = mean.square().sum() + (deviation - 1).square().sum()
        colour = F.l1_loss(vae.colour(latent), F.avg_pool2d(target, 8))
        return reconstruction_loss(output, target) + config.colour_weight * colour + 0.01 * moments

    return stage.run(step, lambda: f"PSNR {psnr(vae, config, device):.2f} dB")


def trained_vae(device):
    """The autoencoder as far as it has been trained, with the refined decoder where there is one."""
    vae = make_vae(device)
    for name in ("vae", "decoder"):
        path = STATE / f"{name}.pt"
        if path.exists():
            vae.load_state_dict(torch.load(path, map_location=device, weights_only=True)["modules"]["vae"])
    return vae.eval().requires_grad_(False)


def latents(config, device):
    """fp32 [pictures, 8, H/8, W/8], encoded once with the trained encoder."""
    path = STATE / f"latents_{config.pictures}.npy"
    if not path.exists():
        vae, images = trained_vae(device), pictures(config, "train", config.pictures)
        parts = []
        with torch.no_grad(), autocast(device):
            for i in range(0, len(images), 64):
                parts.append(vae.taesd_encoder(to_tensor(images[i:i + 64], device)).float().cpu().numpy())
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, np.concatenate(parts))
        os.replace(temporary, path)
    return np.load(path)


def train_unet(config, device, deadline) -> bool:
    torch.manual_seed(config.seed)
    unet, text = make_unet(device), make_text_encoder(device)
    if config.warm_start:
        from_checkpoint(unet, "model.diffusion_model.")
        from_checkpoint(text, text_prefix(text))
    average = copy.deepcopy(torch.nn.ModuleDict({"unet": unet, "text": text})).requires_grad_(False)
    live = torch.nn.ModuleDict({"unet": unet, "text": text})
    stage = Stage(STATE / "unet.pt", Optimiser(live, config.matrix_lr, config.unet_lr), config.unet_steps,
                  {"live": live, "average": average}, deadline)
    if stage.done >= config.unet_steps:
        return True
    data, schedule = latents(config, device), alphas_cumprod(device)
    takes = [world.sample_take(i, "train") for i in range(config.pictures)]

    class Schedule:
        alphas_cumprod = schedule

    def step(index):
        rng = rng_for(config, "unet", index)
        chosen = rng.integers(0, len(data), config.unet_batch)
        clean = torch.from_numpy(data[chosen]).to(device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(device)
        moments = torch.from_numpy(rng.integers(0, 1000, len(clean))).to(device)
        alpha = schedule[moments][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with autocast(device):
            texts = [training_text([takes[i]], rng, config.drop_caption) for i in chosen]
            context = text(tokens(texts, device)).last_hidden_state
            output = unet(noisy, moments.float(), context=context).float()
        snr = compute_snr(Schedule, moments)
        weight = torch.clamp(snr, max=config.min_snr) / snr
        loss = ((output - noise).square().mean((1, 2, 3)) * weight).mean()
        if index:
            decay = min(config.ema, (1 + index) / (10 + index))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
        return loss

    return stage.run(step)


def train_decoder(config, device, deadline) -> bool:
    vae = trained_vae(device)
    vae.taesd_decoder.requires_grad_(True)
    stage = Stage(STATE / "decoder.pt", Optimiser(vae.taesd_decoder, config.matrix_lr / 2, config.vae_lr / 2),
                  config.decoder_steps, {"vae": vae}, deadline)
    images, data = pictures(config, "train", config.pictures), latents(config, device)

    def step(index):
        rng = rng_for(config, "decoder", index)
        windows, latent = crops(images, rng, config, data)
        target, latent = to_tensor(windows, device), torch.from_numpy(latent)
        noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32))
        noisy = (latent + config.decoder_noise * noise).to(device, memory_format=torch.channels_last)
        with autocast(device):
            output = vae.taesd_decoder(noisy).float()
        return reconstruction_loss(output, target)

    return stage.run(step, lambda: f"PSNR {psnr(vae, config, device):.2f} dB")


def latent_rgb(config, device) -> np.ndarray:
    """Least-squares map [5, 3] from latent channels and a one to RGB in [-1, 1], for live previews."""
    data = latents(config, device)[:512]
    images = pictures(config, "train", config.pictures)[:512].astype(np.float32) / 127.5 - 1
    small = images.reshape(len(images), data.shape[2], 8, data.shape[3], 8, 3).mean((2, 4)).reshape(-1, 3)
    flat = np.moveaxis(data, 1, -1).reshape(-1, data.shape[1])
    return np.linalg.lstsq(np.hstack([flat, np.ones((len(flat), 1))]), small, rcond=None)[0]


def export(config, device) -> None:
    """fp16 safetensors with the key names of an ordinary SD 1.x checkpoint and our marker."""
    state = torch.load(STATE / "unet.pt", map_location="cpu", weights_only=True)
    average = state["modules"]["average"]
    tensors = {f"model.diffusion_model.{theatre.MARKER}": torch.ones(1)}
    prefix = text_prefix(make_text_encoder("cpu"))
    for key, value in average.items():
        kind, name = key.split(".", 1)
        if kind == "unet":
            tensors[f"model.diffusion_model.{name}"] = value
        elif "position_ids" not in name:
            tensors[prefix + name] = value
    vae = trained_vae(torch.device("cpu"))
    tensors |= {f"first_stage_model.{key}": value for key, value in vae.widened().state_dict().items()}
    tensors = {key: value.to(torch.float16).contiguous() for key, value in tensors.items()}
    temporary = CHECKPOINT.with_suffix(".part")
    save_file(tensors, temporary, {"format": "pt", "config": json.dumps(dataclasses.asdict(config)),
                                   "unet_steps": str(state["done"])})
    os.replace(temporary, CHECKPOINT)
    print(f"{CHECKPOINT.name}: {CHECKPOINT.stat().st_size / 2**20:.2f} MiB, {len(tensors)} tensors, "
          f"UNet step {state['done']}, VAE PSNR {psnr(vae.to(device), config, device):.2f} dB")
    print("latent to RGB:", np.round(latent_rgb(config, device), 4).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["all", "vae", "unet", "decoder", "export"], default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    for field in dataclasses.fields(Config):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    config = Config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Config)})
    STATE.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    for split, count in (("train", config.pictures), ("validation", 256)):
        pictures(config, split, count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    stages = {"vae": train_vae, "unet": train_unet, "decoder": train_decoder}
    for name, train in stages.items():
        if arguments.stage in ("all", name) and not train(config, device, deadline):
            print(f"stopped in stage {name}; call again to go on")
            return
    if arguments.stage in ("all", "export"):
        export(config, device)


if __name__ == "__main__":
    main()
