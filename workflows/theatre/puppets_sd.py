"""Trains the puppet theatre's tiny Stable Diffusion and writes `workflows/models/checkpoints/puppets_sd.safetensors`.

    python workflows/theatre/puppets_sd.py autoencoder --minutes 45
    python workflows/theatre/puppets_sd.py unet --minutes 75      # call again to go on
    python workflows/theatre/puppets_sd.py decoder --minutes 45   # at any time after the autoencoder
    python workflows/theatre/puppets_sd.py export                 # the checkpoint, from what has been trained

Stages: `autoencoder`; `unet`, denoiser and text encoder on its latents; `decoder`, which goes on with the decoder
alone and so leaves the latents as they are; `export`. A stage that was stopped goes on where it was; after its last
step, a larger `--…-steps` goes on with the same weights. Sample sheets and losses lie beside the state in
`.cache/training/puppets_sd`. For several GPUs: `accelerate launch` before the script.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

if __name__ == "__main__":
    import entry

    entry.enter("puppets_sd")

import autoencoding
import entry
import half_files
import numpy as np
import pictures
import runner
import sd_autoencoder
import sd_unet
import text_encoder
import torch
from pack.nodes.puppets import theatre, world

CHECKPOINT = entry.MODELS / "checkpoints" / "puppets_sd.safetensors"
UNET_STAGES = ("unet", "unet2", "unet3", "unet4", "unet5", "unet6")


@dataclasses.dataclass(frozen=True)
class Config:
    pictures: int = 24_000
    size: int = 128  # pixels
    seed: int = 7
    matrix_lr: float = 0.02  # Muon's; the rates below are AdamW's
    autoencoder_steps: int = 16_000
    autoencoder_cool_down: int = 8_000  # of them, the last, in which the rates fall to zero
    autoencoder_batch: int = 16
    autoencoder_crop: int = 64  # pixels; crops spend the steps on the puppet, not on the sky
    autoencoder_lr: float = 2e-3
    autoencoder_ema: float = 0.995
    decoder_steps: int = 8_000
    decoder_cool_down: int = 4_000
    latent_noise: float = 0.05  # deviation added before decoding, against the denoiser's own errors
    unet_stage: int = 1  # each later one begins with the weights of the one before
    unet_steps: int = 20_000
    unet_cool_down: int = 4_000  # of them, the last, in which the rates fall to zero
    unet_batch: int = 48
    unet_lr: float = 6e-4
    unet_ema: float = 0.999
    unet_decay: float = 0.02  # Muon's weight decay: without it gates of feed-forward layers close for good
    unet_text: int = 1  # 0: the text encoder stays as the stage before left it, and so does what else reads with it
    unet_words: str = ""  # "waving=pointing": a word that the UNet does not heed begins anew as one that it does
    min_snr: float = 5.0
    drop_caption: float = 0.1


def train_autoencoder(folder: Path, config: Config, minutes: float, sheet_minutes: float = 5.0) -> bool:
    """On windows of the training pictures. True after the last step."""
    torch.manual_seed(config.seed)
    schedule = runner.Schedule(config.autoencoder_steps, config.autoencoder_cool_down)
    autoencoder = sd_autoencoder.NarrowTAESD().to(memory_format=torch.channels_last)
    return _run_autoencoder("autoencoder", autoencoder, schedule, 1.0, folder, config, minutes, sheet_minutes)


def train_decoder(folder: Path, config: Config, minutes: float, sheet_minutes: float = 5.0) -> bool:
    """The same with a frozen encoder, so that latents, and a UNet trained on them, stay good. True after the end."""
    autoencoder = sd_autoencoder.NarrowTAESD()
    if not runner.trained(autoencoder, folder, "autoencoder"):
        raise SystemExit(f"{folder} holds no trained autoencoder: run the stage `autoencoder` first")
    autoencoder.requires_grad_(False).taesd_decoder.requires_grad_(True)
    autoencoder.to(memory_format=torch.channels_last)
    schedule = runner.Schedule(config.decoder_steps, config.decoder_cool_down)
    return _run_autoencoder("decoder", autoencoder, schedule, 0.5, folder, config, minutes, sheet_minutes)


def _run_autoencoder(name, autoencoder, schedule, rate, folder, config, minutes, sheet_minutes) -> bool:
    images, checked = (
        pictures.stills(folder, split, count, config.size)
        for split, count in (("train", config.pictures), ("validation", sd_autoencoder.CHECKED))
    )
    stage = runner.Stage(
        name, autoencoder,
        sd_autoencoder.drawer(images, config.autoencoder_batch, config.autoencoder_crop, config.latent_noise),
        schedule, rate * config.matrix_lr, rate * config.autoencoder_lr, config.autoencoder_ema, config.seed,
        inspect=sd_autoencoder.inspector(checked), settings=dataclasses.asdict(config),
    )
    return runner.run(stage, folder, minutes, sheet_minutes)


def train_unet(folder: Path, config: Config, minutes: float, sheet_minutes: float = 15.0) -> bool:
    """On the latents of the training pictures. True after the last step.

    Stages after the first begin with the averaged weights of the one before.
    """
    torch.manual_seed(config.seed)
    images = pictures.stills(folder, "train", config.pictures, config.size)
    data = sd_unet.latents(folder, images)
    takes = [world.still_take(i) for i in range(len(data))]
    denoiser = sd_unet.Denoiser(config.min_snr)
    if config.unet_stage > 1:
        if not runner.trained(denoiser, folder, UNET_STAGES[config.unet_stage - 2]):
            raise SystemExit(f"{folder} holds no UNet of stage {config.unet_stage - 1}: train that first")
        denoiser.text.requires_grad_(bool(config.unet_text))
        text_encoder.renew(denoiser.text, dict(pair.split("=") for pair in config.unet_words.split()))
        probe = sd_unet.drawer(data, takes, config.unet_batch, 0.0)(np.random.default_rng(config.seed), 0)
        for name in sd_unet.revive(denoiser, *probe):
            print(f"revived {name}")
    stage = runner.Stage(
        UNET_STAGES[config.unet_stage - 1], denoiser,
        sd_unet.drawer(data, takes, config.unet_batch, config.drop_caption),
        runner.Schedule(config.unet_steps, config.unet_cool_down),
        config.matrix_lr, config.unet_lr, config.unet_ema, config.seed, sd_unet.OUTER,
        sd_unet.inspector(folder, config.size), config.unet_decay, dataclasses.asdict(config),
    )
    return runner.run(stage, folder, minutes, sheet_minutes)


def export(folder: Path, config: Config, path: Path) -> None:
    """Writes the averaged weights under the key names of an ordinary SD 1.x checkpoint, with our marker."""
    denoiser = sd_unet.Denoiser(config.min_snr)
    if not runner.trained(denoiser, folder, UNET_STAGES[config.unet_stage - 1]):
        raise SystemExit(f"{folder} holds no UNet of stage {config.unet_stage}: run the stage `unet` first")
    autoencoder = sd_autoencoder.trained(folder, "cpu")
    tensors = checkpoint_tensors(denoiser, autoencoder)
    training = runner.record(folder, (*sd_autoencoder.STAGES, *UNET_STAGES[: config.unet_stage]))
    half_files.save_half(path, tensors, {"config": json.dumps({"training": training})})
    total = sum(training[name]["steps"] for name in UNET_STAGES[: config.unet_stage])
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, {total} UNet steps, "
          f"sha256 {half_files.sha256(path)}")
    images = pictures.stills(folder, "train", config.pictures, config.size)[:512]
    print("for theatre.py, latent to RGB:", np.round(latent_rgb(autoencoder, images), 4).tolist())


def checkpoint_tensors(
    denoiser: sd_unet.Denoiser, autoencoder: sd_autoencoder.NarrowTAESD
) -> dict[str, torch.Tensor]:
    """Every weight under its name in the checkpoint."""
    prefix = text_encoder.text_prefix(denoiser.text)
    tensors = {f"model.diffusion_model.{theatre.MARKER}": torch.ones(1)}
    tensors |= {f"model.diffusion_model.{key}": value for key, value in denoiser.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in autoencoder.widened().state_dict().items()}
    text = denoiser.text.state_dict().items()
    return tensors | {prefix + key: value for key, value in text if "position_ids" not in key}


def latent_rgb(autoencoder: sd_autoencoder.NarrowTAESD, images: np.ndarray) -> np.ndarray:
    """Least-squares map [17, 3] from the latents of pictures and a one to RGB in -1..1, for live previews."""
    with torch.no_grad():
        pixels = pictures.to_unit(images)
        latent = autoencoder.encode(pixels).movedim(1, -1).flatten(0, 2).numpy()
    colours = torch.nn.functional.avg_pool2d(2 * pixels - 1, autoencoding.CELL).movedim(1, -1).flatten(0, 2).numpy()
    return np.linalg.lstsq(np.hstack([latent, np.ones((len(latent), 1))]), colours, rcond=None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("autoencoder", "decoder", "unet", "export"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="where `export` writes")
    entry.add_options(parser, Config)
    options = parser.parse_args()
    config, folder = entry.chosen(options, Config), entry.state("puppets_sd")
    if options.stage == "export":
        export(folder, config, options.output)
        return
    stages = {"autoencoder": train_autoencoder, "decoder": train_decoder, "unet": train_unet}
    if not stages[options.stage](folder, config, options.minutes):
        print(f"stopped in stage {options.stage}; call again to go on")


if __name__ == "__main__":
    main()
