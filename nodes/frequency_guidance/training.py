"""Training on a source and a driving picture: ImPoster's fine-tuning, on the path of all trainings on pictures."""

from collections.abc import Sequence
from typing import Any

import torch

from ..training import drawing, picture_training
from ..training.checkpoints import Checkpoints
from ..training.config import LoraConfig, TrainingConfig
from ..training.parallel import only_whole_batches
from ..training.runs import LossMap
from . import method


def train(
    model: Any, clip: Any, vae: Any, latents: Sequence[torch.Tensor], texts: Sequence[str], config: TrainingConfig,
    lora: LoraConfig | None, *, checkpoints: Checkpoints, resume_from: str,
    weights: Sequence[torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], LossMap]:
    """Train a LORA_MODEL, or the whole network if `lora` is None, on the latents [1, C, ...] of the source and the
    driving picture and the text of each, with the `weights` [1, 1, ...] of their cells. Nothing given is modified.

    Raises what picture_training.train_on_pictures raises.
    """
    only_whole_batches("a pair", "since a step is one picture")
    *conditionings, empty = picture_training.encode_texts(clip, [*texts, ""])
    return picture_training.train_on_pictures(
        model, latents, conditionings, config, lora, checkpoints=checkpoints, resume_from=resume_from,
        make_objective=lambda denoising, both: method.SourceDrivingObjective(denoising.losses, both, config.seed),
        preview=drawing.preview_of(vae, conditionings[0], empty, latents[0].shape, config.seed), weights=weights,
    )
