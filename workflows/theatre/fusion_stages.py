"""The theatre's fusion embedding: its pairs in the pack's own training, and the files that come of it."""

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import entry
import fusion_generator
import numpy as np
import torch
from fusion_generator import Config
from half_files import NOBODY, save_half, sha256
from pack.kernels import fusion_embedding as kernel
from pack.nodes import extension
from pack.nodes.fusion_embedding import files, training
from pack.nodes.fusion_embedding.config import CombinerConfig
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.fusion_embedding.pairs import Pair
from pack.nodes.puppets import theatre
from pack.nodes.puppets.vision import shipped
from pack.nodes.training import checkpoints
from pack.nodes.training.config import TrainingConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKPOINT = entry.MODELS / "checkpoints" / "puppets_sd.safetensors"
FUSION = entry.MODELS / "fusion_embeddings" / "puppets_fusion.safetensors"


class TheatrePairs:
    """What the pack's training asks of pairs, from kept renders; the last ones are kept back for a look."""

    def __init__(self, pictures: np.ndarray, config: Config):
        self.pictures, self.config = pictures, config

    def __len__(self) -> int:
        return len(self.pictures) - self.config.kept_back

    def __getitem__(self, index: int) -> Pair:
        return Pair(*torch.from_numpy(np.array(self.pictures[index])).float().div_(255).split(1))

    def size(self, index: int) -> tuple[int, int]:
        return self.config.size, self.config.size

    def digest(self) -> str:
        return f"{self.config.pairs} pairs of puppets, seed {self.config.seed}"


def train_combiner(state: Path, pictures: np.ndarray, config: Config, minutes: float) -> bool:
    """Stage 1, from the shipped image encoder on; True when it is done."""
    if _stage_file(state, "combiner").exists():
        return True
    settings = CombinerConfig(
        config.combiner_steps, config.combiner_batch, config.combiner_lr, projection=config.combiner_width,
        hidden=config.combiner_width,
    )
    run = TrainingConfig(
        settings.steps, settings.learning_rate, config.seed, settings.batch_size, settings.weight_decay
    )
    with _until(time.monotonic() + 60 * minutes):
        kept, resume_from = _checkpoints(state, "combiner", config)
        fusion, _ = training.train_combiner(
            shipped(), TheatrePairs(pictures, config), run, settings,
            checkpoints=kept, resume_from=resume_from,
        )
        _keep(state, "combiner", fusion)
        return True
    return False


def train_generator(state: Path, pictures: np.ndarray, config: Config, minutes: float) -> bool:
    """Stage 2; True when it is done."""
    if _stage_file(state, "generator").exists():
        return True
    theatre.register()
    model, _, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))
    fusion = fusion_generator.train(
        state, model, vae, shipped(), pictures, kept(state, "combiner"), config,
        minutes, FUSION if config.warm_start else None,
    )
    if fusion is not None:
        _keep(state, "generator", fusion)
    return fusion is not None


def export(state: Path, pictures: np.ndarray, config: Config, path: Path) -> None:
    """The file, and what SOURCES.md says of it."""
    described = {"training": json.dumps(dataclasses.asdict(config)), "checkpoint": sha256(CHECKPOINT)}
    fusion = dataclasses.replace(kept(state, "generator"), consent=NOBODY)
    tensors, metadata = files.packed(fusion)
    save_half(path, tensors, {**metadata, **described})
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, sha256 {sha256(path)}")
    first, five, count = retrieval(fusion, pictures[-config.kept_back :])
    print(f"of {count} pairs that were kept back, the target is found first in {first:.1%}, in five in {five:.1%}")


def retrieval(fusion: Fusion, pictures: np.ndarray) -> tuple[float, float, int]:
    """How often the combiner finds a pair's target first and among five, of all of these pairs, and their number."""
    held = torch.from_numpy(np.array(pictures)).float() / 255
    fused = training.encoding.fused(fusion.combiner, fusion.encoder, held[:, 0], held[:, 1])
    ranks = kernel.retrieval_ranks(fused, training.encoding.embeddings(fusion.encoder, held[:, 2]))
    return float((ranks < 1).float().mean()), float((ranks < 5).float().mean()), len(ranks)


@contextlib.contextmanager
def _until(deadline: float) -> Iterator[None]:
    """Stops a run of the pack at the deadline, as its cancel button does: it leaves a checkpoint."""
    timer = threading.Timer(deadline - time.monotonic(), comfy.model_management.interrupt_current_processing)
    timer.daemon = True
    if math.isfinite(deadline):
        timer.start()
    try:
        with contextlib.suppress(comfy.model_management.InterruptProcessingException):
            yield
    finally:
        timer.cancel()
        comfy.model_management.interrupt_current_processing(False)


def _checkpoints(state: Path, name: str, config: Config) -> tuple[checkpoints.Checkpoints, str]:
    """Where a stage keeps its state, and the state that it goes on from."""
    extension.register_folders()
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key.startswith(name)}
    earlier = [choice for choice in checkpoints.choices() if choice.startswith(f"fusion_{name}")]
    kept = checkpoints.Checkpoints(f"fusion_{name}", {**settings, "pairs": config.pairs, "seed": config.seed})
    return kept, earlier[-1] if earlier else checkpoints.NONE


def _stage_file(state: Path, name: str) -> Path:
    return state / f"{name}.safetensors"


def _keep(state: Path, name: str, fusion: Fusion) -> None:
    tensors, metadata = files.packed(fusion)
    temporary = _stage_file(state, name).with_suffix(".part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
    temporary.replace(_stage_file(state, name))


def kept(state: Path, name: str) -> Any:
    """The Fusion that a stage left in `state`."""
    path = _stage_file(state, name)
    with safe_open(str(path), "pt") as file:
        return files.unpacked(load_file(path), file.metadata())
