"""Stage 2 of the theatre's fusion embedding: the pack's own objective, with the theatre's optimiser and averages.

Whole UNet, Muon and an exponential moving average, as puppets_sd itself was trained: AdamW alone, which the pack's
node takes, needs several times the steps for what the source wears.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import runner
import torch
from learned import Learned, draw_step
from pack.nodes.fusion_embedding import encoding, files, layout, method, sampling, training
from pack.nodes.fusion_embedding.config import GeneratorConfig
from pack.nodes.fusion_embedding.method import WHOLE, Fusion
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import DenoisingObjective
from pack.nodes.training.seeds import seed_for
from pack.nodes.training.session import session
from pack.nodes.training.whole_network import WholeNetwork
from safetensors import safe_open

POSE_CHANNELS = (8, 16, 32, 64)
_AT_ONCE = 32  # pairs in one pass of an encoder
_STEPS = 0x6E7  # beside the seeds of other stages


@dataclasses.dataclass(frozen=True)
class Config:
    """Of both stages."""

    seed: int = 7
    pairs: int = 6_000
    kept_back: int = 256  # of them, the last ones, that no stage learns: to look at while it learns
    size: int = 128  # pixels
    # Stage 1. Narrower than published, since embeddings have 128 numbers and not 768.
    combiner_width: int = 256
    combiner_steps: int = 200
    combiner_batch: int = 48
    combiner_lr: float = 3e-4
    # Stage 2, on the whole UNet.
    generator_width: int = 256
    generator_steps: int = 1_200
    generator_cool_down: int = 600
    generator_batch: int = 24
    generator_matrix_lr: float = 0.01
    generator_lr: float = 3e-4
    generator_ema: float = 0.998
    generator_min_snr: float = 5.0  # as the theatre's UNet was trained; published: 0
    generator_decay: float = 0.02  # Muon's weight decay
    # Stage 2 begins with the weights of the shipped file: 1 all, 2 its own paths, beside the checkpoint's UNet.
    warm_start: int = 0


class EncodedPairs:
    """Pairs as the objective takes them, of kept encodings and drawn poses; the last pairs are kept back."""

    def __init__(self, found: dict[str, np.ndarray], poses: np.ndarray, config: Config):
        self.found, self.poses, self.count = found, poses, config.pairs - config.kept_back

    def __getitem__(self, index: int) -> method.EncodedPair:
        latent, states, fused = (
            torch.from_numpy(self.found[name][index : index + 1]).float() for name in ("latent", "states", "fused")
        )
        pose = torch.from_numpy(np.array(self.poses[index : index + 1])).movedim(-1, 1).float() / 255
        return method.EncodedPair(latent, states, fused, pose)

    def sizes(self) -> list[tuple[int, int]]:
        return [self.found["latent"].shape[2:]] * self.count


def encoded(state: Path, pictures: np.ndarray, vae, vision, combiner, config: Config) -> EncodedPairs:
    """Encodes every pair once, fp16 [N, ...] a part, and keeps that in `state`."""
    path = state / f"encoded_{config.pairs}_{config.size}_{config.seed}.npz"
    if not path.exists():
        parts: dict[str, list[np.ndarray]] = {"latent": [], "states": [], "fused": []}
        for start in range(0, len(pictures), _AT_ONCE):
            shown = torch.from_numpy(np.array(pictures[start : start + _AT_ONCE])).float().div_(255)
            source, pose, target = shown.unbind(1)
            with torch.no_grad():
                for name, found in (
                    ("latent", vae.encode(target)), ("states", encoding.states(vision, source)),
                    ("fused", encoding.fused(combiner, vision, source, pose)),
                ):
                    parts[name].append(found.cpu().half().numpy())
        temporary = path.with_suffix(".part.npz")
        np.savez(temporary, **{name: np.concatenate(rows) for name, rows in parts.items()})
        os.replace(temporary, path)
    with np.load(path) as file:
        return EncodedPairs(dict(file), pictures[:, 1], config)


def train(
    state: Path, model, vae, vision, pictures: np.ndarray, fusion: Fusion, config: Config, minutes: float,
    begin: Path | None = None,
) -> Fusion | None:
    """The fusion with a generator, or None where the time ended first. `begin` is a file to start from."""
    settings = GeneratorConfig(
        config.generator_steps, config.generator_batch, config.generator_lr, whole_unet=True,
        hidden=config.generator_width, pose_channels=POSE_CHANNELS,
    )
    run = TrainingConfig(
        settings.steps, settings.learning_rate, config.seed, settings.batch_size, dtype="fp32",
        min_snr_gamma=config.generator_min_snr,
    )
    pairs = encoded(state, pictures, vae, vision, fusion.combiner, config)
    sizes = sampling.model_sizes(model, pairs[0].states.shape[-1], layout.combiner_width(fusion.combiner))
    seeded = torch.Generator().manual_seed(config.seed)
    weights = layout.new_generator(sizes, settings.hidden, settings.pose_channels, seeded)
    shape = [config.generator_batch, *pairs[0].latent.shape[1:]]
    with session(sampling.with_fusion_patches(model), shape, run, whole=True) as denoiser:
        network = WholeNetwork(denoiser.network)
        if begin is not None:
            _start_from(begin, weights, network if config.warm_start == 1 else None)
        live = {key: torch.nn.Parameter(value.to(denoiser.device)) for key, value in weights.items()}
        denoising = DenoisingObjective(training.FusionDenoiser(denoiser, live), [], run)
        objective = method.PoseTransferObjective(denoising, pairs, config.generator_batch, settings)

        def loss(step: int) -> torch.Tensor:
            return objective(step, torch.Generator().manual_seed(seed_for(config.seed + _STEPS, "step", step)))

        learned = Learned(
            {f"generator.{key}": value for key, value in live.items()}
            | {f"unet.{key}": value for key, value in network.parameters().items()}, loss,
        )
        stage = runner.Stage(
            "generator", learned, draw_step, runner.Schedule(config.generator_steps, config.generator_cool_down),
            config.generator_matrix_lr, config.generator_lr, config.generator_ema, config.seed,
            matrix_decay=config.generator_decay, settings=dataclasses.asdict(config),
        )
        with network.attached():
            done = runner.run(stage, state, minutes)
        if not done:
            return None
        runner.trained(learned, state, "generator")  # the average
        unet = {f"diffusion_model.{key}": value for key, value in learned.part("unet.").items()}
        return dataclasses.replace(fusion, generator=learned.part("generator."), unet=unet, unet_kind=WHOLE)


def _start_from(path: Path, weights: dict[str, torch.Tensor], network: WholeNetwork | None) -> None:
    """Take over what a trained fusion of the same sizes holds, its UNet too where `network` is given."""
    with safe_open(str(path), "pt") as file:
        earlier = files.unpacked({key: file.get_tensor(key) for key in file.keys()}, file.metadata())
    weights.update({key: value.float() for key, value in earlier.generator.items()})
    if network is None:
        return
    with torch.no_grad():
        for key, value in network.parameters().items():
            value.copy_(earlier.unet[f"diffusion_model.{key}"])
