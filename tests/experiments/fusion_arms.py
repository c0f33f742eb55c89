"""Fusions for the theatre's checkpoint: the pairs that they learn from, and the paths that an arm's UNet reads.

All are trained by the pack's own `fusion_embedding.training`, on the same pairs with the same seed. The source of a
pair is in another scene, light and view than the target, so that neither embedding nor tokens can tell a target by
its surroundings. What an arm does not read it never sees: without tokens the encoder's states are one row of zeros,
without e_f there is no combiner.

All begin with the UNet and the pose path of the fusion that was shipped before: from the checkpoint on, 600 steps of
AdamW gave neither pose nor puppet. What reads the source begins anew in each.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from experiments import report, runs, sampling, trainings
from pack.nodes.fingerprint import weights_fingerprint
from pack.nodes.fusion_embedding import encoding, files, training
from pack.nodes.fusion_embedding.config import CombinerConfig, GeneratorConfig
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.fusion_embedding.pairs import Pair
from pack.nodes.puppets import render, vision, world
from pack.nodes.puppets.config import LIGHTS, SCENES, Take, actions_of
from pack.nodes.training.config import TrainingConfig
from safetensors import safe_open

TOKENS, EMBEDDING, CLASS = PATHS = "tokens", "e_f's tokens", "class embedding"
SIZE, AT_ONCE, CLOSE_UPS = 128, 500, 0.25
STOPS = (600,)  # steps after which a training is kept, too
EMBEDDING_TOKENS, HIDDEN, POSE_CHANNELS = 4, 256, (8, 16, 32, 64)
# The file that was shipped when version 17 of the protocol was written, and its place in the repository's history.
START, START_AT = "da5b9ad4c2f1c67bb0ec310628b2917ab3250ad051c92635acf62664cf31add6", "d856b7c"
SHIPPED = sampling.CHECKPOINT.parents[1] / "fusion_embeddings" / "puppets_fusion.safetensors"
FIXED = report.fingerprint(SIZE, CLOSE_UPS, EMBEDDING_TOKENS, HIDDEN, POSE_CHANNELS)  # of every training


@dataclasses.dataclass(frozen=True)
class Combiner:
    """Stage 1, as the one shipped before was trained, but longer; embeddings have 128 numbers here."""

    pairs: int = 10_000
    steps: int = 2_000
    batch: int = 48
    rate: float = 3e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Training:
    """Stage 2, the whole UNet, with these PATHS beside that of the pose; `rate` is times the node's default."""

    paths: tuple[str, ...] = PATHS
    rate: float = 3
    steps: int = 5_000
    embedding_rate: float = 1.0
    clip_by_path: bool = False
    early_steps: int = 0
    batch: int = 8
    min_snr_gamma: float = 5.0  # as the theatre's UNet was trained
    seed: int = 0
    combiner: Combiner = Combiner()
    start: str = START


@dataclasses.dataclass(frozen=True)
class Further(Training):
    """A training that goes on from what another has left."""

    after: Training = Training()


@dataclasses.dataclass(frozen=True)
class InOneScene(Further):
    """On pairs that share scene, light and view, so that a picture keeps its source's."""

    pairs: int = 6_000


# --------------------------------------------------------------------------------------------------------- pairs


def allowed(take: Take, framing: str) -> list[str]:
    """The other actions of its puppet that training shows in a framing."""
    who = take.identity
    return [
        action for action in actions_of(framing)
        if action != take.action and (who.species, action) not in world.HELD_OUT[framing]
        and not (action == "raising hat" and who.headwear == "none")
    ]


def elsewhere(take: Take, action: str, rng: np.random.Generator, framing: str, view: str | None = None) -> Take:
    """The same puppet in another action, scene and light."""
    scene, light = (
        world.pick(rng, [option for option in options if option != taken])
        for options, taken in ((SCENES, take.scene), (tuple(LIGHTS), take.light))
    )
    return world.staged(take.identity, action, scene, rng, framing, light, view)


def takes(index: int) -> tuple[Take, Take]:
    """Source and target of a pair, of the split "train"; a quarter of the sources are close-ups.

    Targets are in daylight: another light changes all colours, and no input says which.
    """
    rng = np.random.default_rng([0xF05, index])
    target = dataclasses.replace(world.sample_take(index, "train"), light="day")
    framing = "close_up" if rng.random() < CLOSE_UPS else "full"
    return elsewhere(target, world.pick(rng, allowed(target, framing)), rng, framing), target


def takes_in_one_scene(index: int) -> tuple[Take, Take]:
    """The same, but for action, phase and mirroring, in one scene, light and view."""
    rng = np.random.default_rng([0xF06, index])
    target = world.sample_take(index, "train")
    action = world.pick(rng, allowed(target, "full"))
    turned = dict(phase=round(float(rng.random()), 4), mirrored=bool(rng.random() < 0.5))
    return dataclasses.replace(target, action=action, **turned), target


class Pairs:
    """What the pack's training asks of pairs: source, pose, target, drawn once and kept in `folder`."""

    def __init__(self, folder: Path, count: int, takes: Callable[[int], tuple[Take, Take]] = takes):
        self.takes, self.count = takes, count
        self.parts = [self._kept(folder, start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]

    def _kept(self, folder: Path, start: int, stop: int) -> np.ndarray:
        path = folder / f"pairs_{start}_{stop}.npy"
        if not path.exists():
            print(f"drawing pairs from {start}", flush=True)
            file = io.BytesIO()
            np.save(file, np.stack([_drawn(*self.takes(i)) for i in range(start, stop)]))
            report.replace(path, file.getvalue())
        return np.load(path, mmap_mode="r")

    def pictures(self, start: int, stop: int) -> torch.Tensor:
        """float [N, 3, H, W, 3] in 0..1; both ends lie in one part."""
        part = self.parts[start // AT_ONCE]
        rows = part[start % AT_ONCE : start % AT_ONCE + stop - start]
        return torch.from_numpy(np.array(rows)).float().div_(255)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        return Pair(*self.pictures(index, index + 1)[0].split(1))

    def size(self, _index: int) -> tuple[int, int]:
        return SIZE, SIZE

    def digest(self) -> str:
        return f"{self.count} pairs of puppets: {self.takes.__name__}"


def _drawn(source: Take, target: Take) -> np.ndarray:
    shown, wanted = render.render(source, SIZE), render.render(target, SIZE)
    return np.stack([shown.image, render.draw_pose(wanted.joints, SIZE), wanted.image])


class Encoded(Sequence):
    """All that stage 2 reads of pairs, encoded once for all arms and kept: by name, what EncodedPair takes."""

    def __init__(self, folder: Path, pairs: Pairs, encoder: training.PairEncoder, blank: bool):
        self.pairs, self.blank = pairs, blank
        encoders = {
            "latent": lambda _source, _pose, target: encoder.vae.encode(target),
            "states": lambda source, _pose, _target: encoding.states(encoder.appearance, source),
        }
        if encoder.combiner is not None:
            name = f"fused_{weights_fingerprint(encoder.combiner)[:10]}"
            encoders[name] = lambda source, pose, _target: encoding.fused(
                encoder.combiner, encoder.encoder, source, pose
            )
        self.found = {name.split("_")[0]: self._kept(folder, name, encode) for name, encode in encoders.items()}

    def _kept(self, folder: Path, name: str, encode) -> np.ndarray:
        """fp16, one row a pair."""
        parts = []
        for start in range(0, len(self), AT_ONCE):
            stop = min(start + AT_ONCE, len(self))
            path = folder / f"{name}_{start}_{stop}.npy"
            if not path.exists():
                print(f"encoding pairs from {start}: {name}", flush=True)
                with torch.no_grad():
                    found = encode(*self.pairs.pictures(start, stop).unbind(1))
                file = io.BytesIO()
                np.save(file, found.half().cpu().numpy())
                report.replace(path, file.getvalue())
            parts.append(np.load(path))
        return np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: torch.from_numpy(rows[index : index + 1]).float() for name, rows in self.found.items()}
        row["states"] = blank_states(row["states"]) if self.blank else row["states"]
        return row | {"pose": self.pairs.pictures(index, index + 1)[0, 1:2].movedim(-1, 1)}


def blank_states(states: torch.Tensor) -> torch.Tensor:
    """[B, 1, W]: what an arm without appearance tokens reads instead of an encoder's states."""
    return torch.zeros_like(states[:, :1])


# ------------------------------------------------------------------------------------------------------ training


def combined(folder: Path, setting: Combiner) -> Fusion:
    """The fusion of stage 1, trained where `folder` does not hold it."""

    def train(steps: int, kept, resume_from: str):
        settings = CombinerConfig(steps, setting.batch, setting.rate, projection=HIDDEN, hidden=HIDDEN)
        config = TrainingConfig(
            steps, setting.rate, setting.seed, setting.batch, settings.weight_decay,
            checkpoint_every=trainings.CHECKPOINT_EVERY,
        )
        fusion, losses = training.train_combiner(
            vision.shipped(), Pairs(folder, setting.pairs), config, settings, checkpoints=kept,
            resume_from=resume_from,
        )
        return _packed(fusion, losses)

    return files.unpacked(*trainings.trained(folder, "combiner", setting, setting.steps, train))


def learned(theatre, folder: Path, setting: Training) -> tuple[Fusion, float]:
    """The fusion of both stages, trained where `folder` does not hold it, and the CPU seconds of a step."""

    def train(steps: int, kept, resume_from: str):
        if isinstance(setting, Further):
            fusion, _ = learned(theatre, folder, setting.after)
        else:
            fusion = begun(combined(folder, setting.combiner) if reads_embedding(setting) else Fusion(), start())
        pairs, kept_in = pairs_of(folder, setting)
        generator = GeneratorConfig(
            steps, setting.batch, setting.rate * GeneratorConfig.learning_rate, whole_unet=True, hidden=HIDDEN,
            pose_channels=POSE_CHANNELS, embedding_tokens=EMBEDDING_TOKENS if EMBEDDING in setting.paths else 0,
            embedding_rate=setting.embedding_rate, clip_by_path=setting.clip_by_path,
            early_steps=setting.early_steps, train_further=True,
        )
        config = TrainingConfig(
            steps, generator.learning_rate, setting.seed, setting.batch, min_snr_gamma=setting.min_snr_gamma,
            checkpoint_every=trainings.CHECKPOINT_EVERY,
        )
        encoded = functools.partial(_Kept, kept_in, TOKENS not in setting.paths)
        paths = functools.partial(_without_class_embedding, training._paths)
        with mock.patch.object(training, "PairEncoder", encoded), mock.patch.object(
            training, "_paths", training._paths if CLASS in setting.paths else paths
        ):
            fusion, losses = training.train_generator(
                theatre.model, theatre.vae, vision.shipped(), pairs, fusion, None, config, generator,
                checkpoints=kept, resume_from=resume_from,
            )
        return _packed(fusion, losses)

    without_end = dataclasses.replace(setting, steps=0)
    tensors, metadata = trainings.trained(folder, "generator", without_end, setting.steps, train, STOPS)
    return files.unpacked(tensors, metadata), trainings.cost(metadata)


def pairs_of(folder: Path, setting: Training) -> tuple[Pairs, Path]:
    """What a training learns from, and where its encodings are kept."""
    if isinstance(setting, InOneScene):
        folder = folder / "one_scene"
        return Pairs(folder, setting.pairs, takes_in_one_scene), folder
    return Pairs(folder, setting.combiner.pairs), folder


@functools.cache
def start() -> Fusion:
    """The fusion whose UNet and pose path all arms begin with."""
    kept = runs.STATE / "fusion_embedding" / "start.safetensors"
    path = next((path for path in (SHIPPED, kept) if path.exists() and sampling.sha256(path) == START), None)
    if path is None:
        raise SystemExit(
            "all arms begin with an earlier fusion, which is in the repository's history: git show "
            f"{START_AT}:{SHIPPED.relative_to(runs.scripts.ROOT)} > {kept}, in a folder that you make"
        )
    with safe_open(str(path), "pt") as file:
        return files.unpacked(safetensors.torch.load_file(path), file.metadata())


def begun(fusion: Fusion, start: Fusion) -> Fusion:
    """With pose path and UNet of `start`, to be trained further."""
    pose = {name: weight for name, weight in start.generator.items() if name.startswith("pose.")}
    return dataclasses.replace(fusion, generator=pose, unet=start.unet, unet_kind=start.unet_kind)


def read(
    setting: Training, fusion: Fusion, appearance, sources: dict[str, torch.Tensor], pose: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [B, T, W] and e_f [B, D] or None, as the arm was trained, of sources [B, H, W, 3] by the path of
    PATHS that reads them: TOKENS, and EMBEDDING for both that read e_f.
    """
    states, fused = encoding.states(appearance, sources[TOKENS]), None
    if reads_embedding(setting):
        fused = encoding.fused(fusion.combiner, fusion.encoder, sources[EMBEDDING], pose)
    return states if TOKENS in setting.paths else blank_states(states), fused


def reads_embedding(setting: Training) -> bool:
    """Whether e_f reaches the UNet at all."""
    return EMBEDDING in setting.paths or CLASS in setting.paths


class _Kept(training.PairEncoder):
    """The pack's encoder of pairs, which takes what has been encoded before."""

    def __init__(self, folder: Path, blank: bool, *args):
        super().__init__(*args)
        self.folder, self.blank = folder, blank

    def fill(self) -> None:
        self.shared = Encoded(self.folder, self.pairs, self, self.blank)


def _without_class_embedding(plain, parameters, generator):
    """The paths of a training in which the class embedding stays at the zeros that it begins with."""
    for name, parameter in parameters.items():
        if name.startswith("generator.embedding."):
            parameter.requires_grad_(False)
    return plain(parameters, generator)


def _packed(fusion: Fusion, losses: dict[str, list[float]]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = files.packed(fusion)
    return tensors, metadata | {"loss": f"{np.mean(losses['loss'][-100:]):.4f}"}
