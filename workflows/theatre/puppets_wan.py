"""Trains the puppet theatre's tiny Wan; writes `diffusion_models/puppets_wan.safetensors` and its VAE.

    python workflows/theatre/puppets_wan.py frames --minutes 45         # the autoencoder, on single frames
    python workflows/theatre/puppets_wan.py clips --minutes 30          # and on clips, from those weights
    python workflows/theatre/puppets_wan.py transformer --minutes 100   # call again to go on
    python workflows/theatre/puppets_wan.py export                      # both files, from what has been trained

All of it sees close-ups only, clips of 9 frames; the transformer never sees a reference or a clean frame: that is the
video adapter's work. Captions are read by the text encoder of `puppets_sd.safetensors`, which stays as it is: one
encoder serves both models. A stage that was stopped goes on where it was. Sample sheets and losses lie beside the
state in `.cache/training/puppets_wan`. For several GPUs: `accelerate launch` before the script.
"""

import argparse
import copy
import dataclasses
import json
import math
from pathlib import Path

if __name__ == "__main__":
    import entry

    entry.enter("puppets_wan")

import comfy.latent_formats
import entry
import half_files
import numpy as np
import runner
import text_encoder
import torch
import wan_autoencoder
import wan_transformer
import whole_clip
from pack.nodes.puppets import theatre
from pack.nodes.training.differentiable import host_in_training

ENCODER = entry.MODELS / "checkpoints" / "puppets_sd.safetensors"
TRANSFORMER = entry.MODELS / "diffusion_models" / "puppets_wan.safetensors"
AUTOENCODER = entry.MODELS / "vae" / "puppets_wan_vae.safetensors"
TRANSFORMER_STAGES = ("transformer", "transformer2", "transformer3")
_CHECKED = 48  # held-out frames, or clips at a quarter, for the figures while it trains
_FITTED = 48  # clips to fit the preview's colours to


@dataclasses.dataclass(frozen=True)
class Config:
    frames: int = 24_000  # single pictures
    clips: int = 9_000
    size: int = 96  # pixels
    seed: int = 7
    matrix_lr: float = 0.02  # Muon's; the rates below are AdamW's
    autoencoder_lr: float = 2e-3
    autoencoder_ema: float = 0.995
    latent_noise: float = 0.05  # deviation added before decoding, against the transformer's own errors
    frames_steps: int = 10_000
    frames_cool_down: int = 5_000  # of them, the last, in which the rates fall to zero
    frames_batch: int = 16
    frames_crop: int = 64  # pixels
    clips_steps: int = 1_500
    clips_cool_down: int = 1_500
    clips_batch: int = 4  # never 1: PyTorch then takes a convolution that is several times slower on a CPU
    clips_crop: int = 48
    transformer_stage: int = 1  # each later one begins with the weights of the one before
    transformer_steps: int = 20_000
    transformer_cool_down: int = 2_000
    transformer_lr: float = 1e-3
    transformer_ema: float = 0.999
    clip_batch: int = 32  # by turns with
    frame_batch: int = 96
    drop_clause: float = 0.25  # of shirt, hat, action, scene each
    bare: float = 0.2  # of the captions, without any clothes
    drop_caption: float = 0.1


def train_frames(folder: Path, config: Config, minutes: float, sheet_minutes: float = 5.0) -> bool:
    """The autoencoder on windows of single frames. True after the last step."""
    torch.manual_seed(config.seed)
    images, checked = (
        wan_transformer.rendered(folder, "frames", split, count, config.size)
        for split, count in (("train", config.frames), ("validation", _CHECKED))
    )
    stage = runner.Stage(
        "frames", wan_autoencoder.WanAutoencoder(),
        wan_autoencoder.drawer(images, config.frames_batch, config.frames_crop, config.latent_noise),
        runner.Schedule(config.frames_steps, config.frames_cool_down),
        config.matrix_lr, config.autoencoder_lr, config.autoencoder_ema, config.seed,
        inspect=wan_autoencoder.inspector(checked), settings=dataclasses.asdict(config),
    )
    return runner.run(stage, folder, minutes, sheet_minutes)


def train_clips(folder: Path, config: Config, minutes: float, sheet_minutes: float = 5.0) -> bool:
    """The same autoencoder on windows of clips, at half the rates. True after the last step."""
    images, checked = (
        wan_transformer.rendered(folder, "clips", split, count, config.size)
        for split, count in (("train", config.clips), ("validation", _CHECKED // 4))
    )
    stage = runner.Stage(
        "clips", wan_autoencoder.trained(folder, "cpu").train().requires_grad_(True),
        wan_autoencoder.drawer(images, config.clips_batch, config.clips_crop, config.latent_noise),
        runner.Schedule(config.clips_steps, config.clips_cool_down),
        config.matrix_lr / 2, config.autoencoder_lr / 2, config.autoencoder_ema, config.seed,
        inspect=wan_autoencoder.inspector(checked), settings=dataclasses.asdict(config),
    )
    for layer in (stage.module.vae.conv1, stage.module.vae.conv2):  # the identity; `fold` writes them in the end
        layer.requires_grad_(False)
    return runner.run(stage, folder, minutes, sheet_minutes)


def training_latents(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """float16 latents of frames and clips as the trained autoencoder gives them."""
    counts = {"frames": config.frames, "clips": config.clips}
    return {
        kind: wan_transformer.latents(
            folder, wan_transformer.rendered(folder, kind, "train", count, config.size), kind
        )
        for kind, count in counts.items()
    }


def train_transformer(folder: Path, config: Config, minutes: float, sheet_minutes: float = 15.0) -> bool:
    """On latents of clips and of single frames by turns. True after the last step.

    Stages after the first begin with the averaged weights of the one before, and read with the text encoder of today.
    """
    torch.manual_seed(config.seed)
    data = training_latents(folder, config)
    mean, deviation = wan_transformer.statistics(data["clips"])
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(ENCODER, "cpu"))
    if config.transformer_stage > 1:
        load_transformer(denoiser, folder, config.transformer_stage - 1)
    stage = runner.Stage(
        TRANSFORMER_STAGES[config.transformer_stage - 1], denoiser,
        wan_transformer.drawer(
            {kind: wan_transformer.normalised(part, mean, deviation) for kind, part in data.items()},
            {"frames": config.frame_batch, "clips": config.clip_batch},
            config.drop_clause, config.bare, config.drop_caption,
        ),
        runner.Schedule(config.transformer_steps, config.transformer_cool_down),
        config.matrix_lr, config.transformer_lr, config.transformer_ema, config.seed, wan_transformer.OUTER,
        wan_transformer.inspector(folder, config.size, mean, deviation), settings=dataclasses.asdict(config),
    )
    with host_in_training():
        return runner.run(stage, folder, minutes, sheet_minutes)


def load_transformer(denoiser: wan_transformer.VideoDenoiser, folder: Path, stage: int) -> None:
    """The averaged weights of a stage, but for the text encoder's, which stay those of `denoiser`."""
    reads = copy.deepcopy(denoiser.text.state_dict())
    if not runner.trained(denoiser, folder, TRANSFORMER_STAGES[stage - 1]):
        raise SystemExit(f"{folder} holds no transformer of stage {stage}: train that first")
    denoiser.text.load_state_dict(reads)


def export(folder: Path, config: Config, transformer: Path, autoencoder: Path) -> None:
    """Writes both files from what was trained in `folder`, and prints what theatre.py says of them."""
    denoiser = wan_transformer.VideoDenoiser(text_encoder.trained(ENCODER, "cpu"))
    load_transformer(denoiser, folder, config.transformer_stage)
    clips = training_latents(folder, config)["clips"]
    mean, deviation = wan_transformer.statistics(clips)
    training = runner.record(folder, ("frames", "clips", *TRANSFORMER_STAGES[: config.transformer_stage]))
    training["text_encoder"] = half_files.sha256(ENCODER)
    save_autoencoder(autoencoder, wan_autoencoder.trained(folder, "cpu").vae, mean, deviation, training)
    save_transformer(transformer, denoiser.transformer.state_dict(), training)
    for path in (transformer, autoencoder):
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, sha256 {half_files.sha256(path)}")
    images = wan_transformer.rendered(folder, "clips", "train", config.clips, config.size)[:_FITTED]
    colours = wan_autoencoder.mean_colours(wan_autoencoder.to_pixels(images)).numpy()
    normal = wan_transformer.normalised(clips[:_FITTED], mean, deviation).astype(np.float32)
    print("for theatre.py, latent to RGB:", np.round(latent_rgb(normal, colours), 4).tolist())


def save_transformer(path: Path, tensors: dict[str, torch.Tensor], training: dict) -> None:
    """The transformer's weights with our marker; `training` (settings, steps) goes into the metadata."""
    # ComfyUI reads "transformer" itself: without this pack it takes the file for a Wan of that text width.
    config = {"transformer": {"text_dim": theatre.TEXT_WIDTH}, "training": training}
    half_files.save_half(path, {**tensors, theatre.WAN_MARKER: torch.ones(1)}, {"config": json.dumps(config)})


def save_autoencoder(path: Path, vae, mean: torch.Tensor, deviation: torch.Tensor, training: dict) -> None:
    """The autoencoder, so that latents of this `mean` and `deviation` [16] have Wan's own after encoding.

    ComfyUI's `process_latent_in` then gives the zero mean and unit deviation that the transformer learned.
    """
    folded = copy.deepcopy(vae).float().cpu()
    wan = comfy.latent_formats.Wan21()
    scale = wan.latents_std.flatten() / deviation.cpu()
    whole_clip.fold(folded, wan.latents_mean.flatten() - mean.cpu() * scale, scale)
    half_files.save_half(path, folded.state_dict(), {"config": json.dumps({"training": training})})


def latent_rgb(latents: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Least-squares map [17, 3] from normalised latents [N, 16, ...] and a one to colours [N, 3, ...]."""
    flat, target = (np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) for array in (latents, colours))
    return np.linalg.lstsq(np.hstack([flat, np.ones((len(flat), 1))]), target, rcond=None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("frames", "clips", "transformer", "export"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    entry.add_options(parser, Config)
    options = parser.parse_args()
    config, folder = entry.chosen(options, Config), entry.state("puppets_wan")
    if options.stage == "export":
        export(folder, config, TRANSFORMER, AUTOENCODER)
        return
    stages = {"frames": train_frames, "clips": train_clips, "transformer": train_transformer}
    if not stages[options.stage](folder, config, options.minutes):
        print(f"stopped in stage {options.stage}; call again to go on")


if __name__ == "__main__":
    main()
