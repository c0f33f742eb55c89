"""Short trainings of a fusion embedding's two stages on tiny models of ComfyUI, with settings that take seconds."""

import torch
from pack.nodes.fusion_embedding import pairs, training
from pack.nodes.fusion_embedding.config import CombinerConfig, GeneratorConfig
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import TrainingConfig
from support import fusions, tiny_model

MODEL = tiny_model.as_loaded(fusions.model())
VAE = fusions.autoencoder()
VISION = fusions.as_loaded(fusions.vision())


def data(count=4, size=64, seed=0):
    lists = fusions.pair_lists(count, size, seed)
    return pairs.ListedPairs(*([lists[role]] for role in pairs.ROLES))


def run_config(**settings):
    return TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 0, "batch_size": 2, **settings})


def combined(
    pair_set=None, clip_vision=VISION, resume_from="none", checkpoints=None, train_encoder=False, **settings
):
    config = CombinerConfig(projection=16, hidden=16, train_encoder=train_encoder, batch_size=4, dropout=0.2)
    with torch.inference_mode():
        return training.train_combiner(
            clip_vision, pair_set or data(), run_config(**{"batch_size": 4, **settings}), config,
            checkpoints=checkpoints or Checkpoints("test", {}), resume_from=resume_from,
        )


def generated(
    pair_set=None, model=MODEL, fusion=None, resume_from="none", checkpoints=None, generator=None, masks=None,
    **settings,
):
    fusion = Fusion(fusions.combiner()) if fusion is None else fusion
    config = GeneratorConfig(**{"hidden": 8, "rank": 2, "pose_channels": (4, 6, 8, 10), **(generator or {})})
    with torch.inference_mode():
        return training.train_generator(
            model, VAE, VISION, pair_set or data(), fusion, VISION, run_config(**settings), config,
            checkpoints=checkpoints or Checkpoints("test", {}), resume_from=resume_from, masks=masks,
        )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
