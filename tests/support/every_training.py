"""What each Train node trains, for three steps on small models: one call for tests that all of them must pass."""

import dataclasses

import torch
from pack.nodes.frequency_guidance import training as pair_training
from pack.nodes.identity_prior import training as prior_training
from pack.nodes.identity_prior.config import IdentityPriorConfig
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.video_identity import training as video_training
from support import action_identifiers, action_trainings, fusion_trainings, fusions, tiny_clip, tiny_model

FP8 = {"dtype": torch.float8_e4m3fn, "compute": torch.float32}  # stored in fp8 and computed in fp32


def prior(stored, weights, **settings):
    classes = prior_training.ClassPictures(["a cat", "a dog"], latents(2, seed=10))
    return prior_training.train(
        _loaded(tiny_model.picture(**stored)), CLIP, None, latents(3), ["a red cat", "a", "a sks dog"], classes,
        IdentityPriorConfig(rank=2), config(**settings), weights=weights, **UNTOLD,
    )


def pair(stored, weights, **settings):
    return pair_training.train(
        _loaded(tiny_model.picture(**stored)), CLIP, None, latents(2), ["a cat", "a dog"], config(**settings),
        LoraConfig(rank=2), weights=weights and weights[:2], **UNTOLD,
    )


def action(stored, weights, **settings):
    pictures = dataclasses.replace(action_trainings.exemplars(), weights=weights)
    model = _loaded(action_identifiers.reading(tiny_model.picture(**stored)))
    identifier, losses = action_trainings.train(model, pictures=pictures, **settings)
    return identifier.tokens, losses


def generator(stored, weights, **settings):
    masks = None if weights is None else [cells[0, :, :, :, None] for cells in weights]
    model = _loaded(fusions.model(**stored))
    fusion, losses = fusion_trainings.generated(fusion_trainings.data(3), model, masks=masks, **settings)
    return {**fusion.generator, **fusion.unet}, losses


def adapter(stored, weights, **settings):
    videos = latents(3, (1, 16, 2, 4, 4))
    weights = weights and [cells[:, :, None, :4, 2:6].expand(1, 1, 2, 4, 4) for cells in weights]
    trained, losses = video_training.train(
        _loaded(tiny_model.wan(num_layers=2, **stored)), videos, latents(3, (1, 16, 1, 4, 4), seed=10),
        [tiny_model.conditioning(i) for i in range(3)], config(**settings), 2, weights=weights, **UNTOLD,
    )
    return trained.tensors(), losses


# But for the combiner, which trains an encoder whole and looks at pictures through its masks.
TRAININGS = {made.__name__: made for made in (prior, pair, action, generator, adapter)}
CLIP = tiny_clip.as_loaded(tiny_clip.clip())
UNTOLD = {"checkpoints": Checkpoints("test", {}), "resume_from": "none"}


def trained(name, stored=None, weights=None, **settings):
    """The tensors and the losses of a training, with these `weights` [1, 1, 8, 8] of three pictures' cells."""
    with torch.inference_mode():
        return TRAININGS[name](stored or {}, weights, **settings)


def latents(count, shape=(1, 4, 8, 8), seed=0):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


def config(**settings):
    return TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 0, "batch_size": 2, **settings})


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _loaded(model):
    return tiny_model.as_loaded(model)
