"""The theatre's video identity adapter: clips and pictures of who is in them, learnt by the pack's own objective."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import comfy.sd
import numpy as np
import torch
import wan_export
import wan_stages as stages
from pack.nodes.puppets import captions, render, theatre, world
from pack.nodes.puppets.config import NAMED_ACTIONS, SCENES, Identity, Take
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import DenoisingObjective
from pack.nodes.training.seeds import seed_for
from pack.nodes.video_identity import reference_picture, training
from pack.nodes.video_identity.config import ReferenceConfig
from pack.nodes.video_identity.method import VideoAdapter, adapter_from
from timeboxed import Learnt, Optimiser, Stage, follow

PAIRS = 2_000
REFERENCE = ReferenceConfig(size=96, crop_factor=1.1)  # the puppet whole: clothes are its face
_SEED = 0xADA7


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A run over `PAIRS` clips of one puppet each."""

    adapter_rank: int = 16
    adapter_steps: int = 400
    adapter_batch: int = 12
    adapter_pictures: int = 36  # first frames, every other step
    adapter_matrix_lr: float = 0.02
    adapter_lr: float = 2e-3  # of what is no matrix with more than eight rows
    adapter_ema: float = 0.99
    adapter_drop: float = 0.1  # of the captions, for guidance without a prompt


def reference_take(identity: Identity, rng: np.random.Generator) -> Take:
    """Another moment of the same puppet: another action, scene, light and camera than the clip's, by chance."""
    allowed = [action for action in NAMED_ACTIONS if (identity.species, action) not in world.HELD_OUT_PAIRS]
    return world.staged(identity, world.pick(rng, allowed), world.pick(rng, SCENES), rng)


def reference_image(take: Take, size: int) -> torch.Tensor:
    """float [1, size, size, 3] in 0..1: the puppet alone on white, as Prepare Reference gives it."""
    picture = render.render(take, size)
    image = torch.from_numpy(picture.image).float()[None] / 255
    mask = torch.from_numpy(np.array(picture.mask)).float()[None]
    return reference_picture.prepare(image, dataclasses.replace(REFERENCE, size=size), mask)[0]


def alone(config: stages.Config) -> list[int]:
    """The clips that show one puppet, at most `PAIRS`."""
    return [index for index in range(config.clips) if len(stages.clip_takes(index)) == 1][:PAIRS]


def references(state: Path, config: stages.Config, indices: list[int], device) -> torch.Tensor:
    """[N, 16, 1, h, w] of each clip's puppet, as the trained encoder gives them."""
    vae = stages.trained_vae(state, config, device)["vae"]
    images = []
    for index in indices:
        rng = np.random.default_rng([_SEED, config.seed, index])
        images.append(reference_image(reference_take(stages.clip_takes(index)[0].identity, rng), config.size))
    pixels = torch.cat(images).movedim(-1, 1).unsqueeze(2) * 2 - 1
    with torch.no_grad(), stages.autocast(device):
        return torch.cat([stages.whole_clip.encode(vae, part.to(device)).float().cpu() for part in pixels.split(32)])


def texts(config: stages.Config, indices: list[int], drop: float) -> list[str]:
    """Species, action and scene of each clip, but nothing of what the puppet wears: the reference has to tell it."""
    rng = np.random.default_rng([_SEED, config.seed])
    return ["" if rng.random() < drop else captions.group_caption(stages.clip_takes(i)[:1]) for i in indices]


def train(
    state: Path, config: stages.Config, settings: AdapterConfig, device, transformer: Path, encoder: Path,
    name: str = "puppets_wan_identity", deadline: float = math.inf,
) -> tuple[VideoAdapter, list] | None:
    """The adapter for `transformer` and [step, loss] at times; None where the deadline came first.

    The pack's own objective, on the clips and on their first frames by turns, with the theatre's optimiser and an
    average, as the transformer was trained. A stopped run goes on from `state`, where it is kept under `name`.
    """
    indices = alone(config)
    _, clips = stages.latents(state, config)
    mean, deviation = (value[:, None, None, None] for value in stages.statistics(clips))
    theatre.register()
    model = comfy.sd.load_diffusion_model(str(transformer))
    clip = comfy.sd.load_checkpoint_guess_config(str(encoder), output_vae=False)[1]
    out = model.get_model_object("latent_format").process_out

    def as_encoded(raw: torch.Tensor) -> list[torch.Tensor]:
        """What VAE Encode gives with the exported autoencoder, one latent an item."""
        return list(out((raw.float() - mean) / deviation).split(1))

    encoded: dict[str, list] = {}
    for text in (wanted := texts(config, indices, settings.adapter_drop)):
        if text not in encoded:
            encoded[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    run = TrainingConfig(
        settings.adapter_steps, settings.adapter_lr, seed=config.seed, batch_size=settings.adapter_batch, dtype="fp32"
    )
    given = as_encoded(torch.from_numpy(clips[indices])), as_encoded(references(state, config, indices, device))
    conditionings = [encoded[text] for text in wanted]
    of = json.dumps([dataclasses.asdict(settings), dataclasses.asdict(config), wan_export.sha256(transformer)])
    path = state / f"{name}_{hashlib.sha256(of.encode()).hexdigest()[:8]}.pt"
    with training.prepared(model, *given, conditionings, run, settings.adapter_rank) as prepared:
        adapter, samples, denoiser = prepared
        first = [dataclasses.replace(sample, latent=sample.latent[:, :, :1]) for sample in samples]
        stills = dataclasses.replace(run, batch_size=settings.adapter_pictures)
        objectives = DenoisingObjective(denoiser, first, stills), DenoisingObjective(denoiser, samples, run)
        live = Learnt(adapter.tensors())
        average = live.frozen()
        optimiser = Optimiser(live, settings.adapter_matrix_lr, settings.adapter_lr)
        stage = Stage(path, optimiser, settings.adapter_steps, {"live": live, "average": average}, deadline)

        def step(index: int) -> torch.Tensor:
            follow(average, live, index, settings.adapter_ema)
            generator = torch.Generator().manual_seed(seed_for(config.seed, "step", index))
            return objectives[index % 2](index, generator)

        if not stage.run(step):
            return None
    return adapter_from({key: tensor.cpu() for key, tensor in average.part().items()}), stage.log
