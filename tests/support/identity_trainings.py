"""Shared by the tests of training and of prior files: a short training by the node, and LoRAs like its result."""

from __future__ import annotations

import folder_paths
import torch
from pack.nodes.identity_prior import files
from pack.nodes.identity_prior.training_nodes import UnderstudySaveIdentityPrior, UnderstudyTrainIdentityPrior
from pack.nodes.subject_tokens import Subject
from pack.nodes.training import picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from support import tiny_model
from support.identity_edits import SHAPE

ROBOT = Subject("sks", "robot", ("a sks robot waving",))
SIZE = 64


def train(loaded, images, captions, **settings):
    """The node, as ComfyUI calls it: every input a list."""
    model, clip, vae = loaded
    values = {
        "model": model, "clip": clip, "vae": vae, "identity_token": "sks", "class_noun": "robot", "steps": 2,
        "learning_rate": 1e-3, "rank": 2, "batch_size": 1, "seed": 5, "prior_weight": 1.0, "augment": "none",
        "resume_from": "none", "class_count": 2, "checkpoint_every": 0,
    }
    lists = {name: settings.pop(name) for name in ("class_images", "class_captions") if name in settings}
    values = {name: [value] for name, value in (values | settings).items()}
    with torch.inference_mode():
        return UnderstudyTrainIdentityPrior.execute(images=images, captions=captions, **values, **lists).result


def lora_of(model, seed=0, rank=2):
    """A LoRA like the result of training, with noise for trained values."""
    with torch.inference_mode():
        lora, _ = picture_training.train_on_pictures(
            model, [torch.randn(SHAPE)], [tiny_model.conditioning(0)],
            TrainingConfig(steps=1, learning_rate=1e-2, seed=seed, checkpoint_every=0), LoraConfig(rank=rank),
            checkpoints=Checkpoints("test", {}), resume_from="none",
        )
    generator = torch.Generator().manual_seed(seed)
    return {key: weight if weight.ndim == 0 else torch.randn(weight.shape, generator=generator) * 0.2
            for key, weight in lora.items()}


def saved(lora, identity=ROBOT, prefix="anna"):
    """The name under which ComfyUI lists this prior, once Save Identity Prior has written it."""
    UnderstudySaveIdentityPrior.execute(lora, identity, prefix)
    folder_paths.filename_list_cache.clear()
    return max(name for name in files.FOLDER.choices() if name.startswith(prefix))
