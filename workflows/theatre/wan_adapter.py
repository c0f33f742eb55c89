"""The theatre's video identity adapter: clips and pictures of who is in them, learned by the pack's own objective."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import comfy.sd
import half_files
import numpy as np
import runner
import torch
import wan_autoencoder
import wan_transformer
from learned import Learned, draw_step
from pack.nodes.puppets import captions, render, theatre, world
from pack.nodes.puppets.config import SCENES, Identity, Take, actions_of
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import DenoisingObjective
from pack.nodes.training.seeds import seed_for
from pack.nodes.video_identity import reference_picture, training
from pack.nodes.video_identity.config import ReferenceConfig
from pack.nodes.video_identity.method import VideoAdapter, adapter_from

REFERENCE = ReferenceConfig(size=96, crop_factor=1.1)  # head, hat and shirt: clothes are its face
_SEED = 0xADA7
_ENCODED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """A run over the first `pairs` clips."""

    seed: int = 7
    size: int = 96  # pixels
    clips: int = 9_000  # of the autoencoder's and the transformer's training
    pairs: int = 4_000
    rank: int = 32
    steps: int = 2_000
    cool_down: int = 600
    clip_batch: int = 12  # by turns with
    frame_batch: int = 24  # first frames
    matrix_lr: float = 0.02
    lr: float = 2e-3  # of what is no matrix with more than eight rows
    ema: float = 0.99
    drop_caption: float = 0.1  # for guidance without a prompt


def reference_take(identity: Identity, rng: np.random.Generator) -> Take:
    """Another close-up of the same puppet: another action, scene, light and view than the clip's, by chance."""
    allowed = [
        action for action in actions_of("close_up", True)
        if (identity.species, action) not in world.HELD_OUT["close_up"]
        and not (action == "raising hat" and identity.headwear == "none")
    ]
    return world.staged(identity, world.pick(rng, allowed), world.pick(rng, SCENES), rng, "close_up")


def reference_image(take: Take, size: int) -> torch.Tensor:
    """float [1, size, size, 3] in 0..1: the puppet alone on white, as Prepare Reference gives it."""
    picture = render.render(take, size)
    image = torch.from_numpy(picture.image).float()[None] / 255
    mask = torch.from_numpy(np.array(picture.mask)).float()[None]
    return reference_picture.prepare(image, dataclasses.replace(REFERENCE, size=size), mask)[0]


def references(autoencoder: wan_autoencoder.WanAutoencoder, config: Config) -> torch.Tensor:
    """float32 [pairs, 16, 1, h, w] of each clip's puppet, as the trained encoder gives them."""
    device, parts = next(autoencoder.parameters()).device, []
    for start in range(0, config.pairs, _ENCODED_AT_ONCE):
        images = []
        for index in range(start, min(start + _ENCODED_AT_ONCE, config.pairs)):
            rng = np.random.default_rng([_SEED, config.seed, index])
            who = wan_transformer.clip_take(index).identity
            images.append(reference_image(reference_take(who, rng), config.size))
        pixels = torch.cat(images).movedim(-1, 1).unsqueeze(2) * 2 - 1
        with torch.no_grad():
            parts.append(autoencoder.encode(pixels.to(device)).cpu())
    return torch.cat(parts)


def texts(config: Config) -> list[str]:
    """Species, action and scene of each clip, but nothing that the puppet wears: the reference has to tell it."""
    rng = np.random.default_rng([_SEED, config.seed])
    takes = (wan_transformer.clip_take(index) for index in range(config.pairs))
    return ["" if rng.random() < config.drop_caption else captions.caption(take, clothes=False) for take in takes]


def train(
    folder: Path, config: Config, transformer: Path, encoder: Path, name: str = "puppets_wan_identity",
    minutes: float = math.inf,
) -> VideoAdapter | None:
    """The adapter for `transformer`, or None where the time ended first. `folder` is the one of puppets_wan.

    The pack's own objective, on clips and on their first frames by turns, with the theatre's optimiser and an
    average, as the transformer was trained. A stopped run goes on from `folder`; its state's name has a hash of the
    settings.
    """
    device = runner.make_accelerator().device
    images = wan_transformer.rendered(folder, "clips", "train", config.clips, config.size)
    clips = wan_transformer.latents(folder, images, "clips")
    mean, deviation = (value[:, None, None, None] for value in wan_transformer.statistics(clips))
    theatre.register()
    model = comfy.sd.load_diffusion_model(str(transformer))
    clip = comfy.sd.load_checkpoint_guess_config(str(encoder), output_vae=False)[1]
    process_out = model.get_model_object("latent_format").process_out

    def as_encoded(raw: torch.Tensor) -> list[torch.Tensor]:
        """What VAE Encode gives with the exported autoencoder, one latent an item."""
        return list(process_out((raw.float() - mean) / deviation).split(1))

    wanted = texts(config)
    encoded = {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in dict.fromkeys(wanted)}
    settings = TrainingConfig(config.steps, config.lr, seed=config.seed, batch_size=config.clip_batch, dtype="fp32")
    latents = as_encoded(torch.from_numpy(clips[: config.pairs]))
    shown = as_encoded(references(wan_autoencoder.trained(folder, device), config))
    key = json.dumps([dataclasses.asdict(config), half_files.sha256(transformer), half_files.sha256(encoder)])
    with training.prepared(
        model, latents, shown, [encoded[text] for text in wanted], settings, config.rank
    ) as (adapter, samples, denoiser):
        first = [dataclasses.replace(sample, latent=sample.latent[:, :, :1]) for sample in samples]
        stills = dataclasses.replace(settings, batch_size=config.frame_batch)
        objectives = DenoisingObjective(denoiser, first, stills), DenoisingObjective(denoiser, samples, settings)

        def loss(step: int) -> torch.Tensor:
            return objectives[step % 2](step, torch.Generator().manual_seed(seed_for(config.seed, "step", step)))

        stage = runner.Stage(
            f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:8]}", Learned(adapter.tensors(), loss), draw_step,
            runner.Schedule(config.steps, config.cool_down), config.matrix_lr, config.lr, config.ema, config.seed,
        )
        if not runner.run(stage, folder, minutes):
            return None
    average = Learned(adapter.tensors())
    runner.trained(average, folder, stage.name)
    return adapter_from(average.part())
