"""Short trainings of an action identifier on a tiny model and text encoder, in seconds."""

import torch
from pack.nodes.action_identifier import training
from pack.nodes.action_identifier.config import ActionTrainingConfig
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import TrainingConfig
from support import action_identifiers, tiny_clip, tiny_model

SUBJECTS = ("a cat on a beach", "a (red:1.2) robot", "a dog <action> at night")
MODEL = tiny_model.as_loaded(action_identifiers.reading(tiny_model.picture()))
CLIP = tiny_clip.as_loaded(tiny_clip.clip())


def latents(count=3, seed=0, shape=(1, 4, 8, 8)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]


def exemplars(contrasts=True, shape=(1, 4, 8, 8)):
    return training.Exemplars(
        latents(shape=shape), SUBJECTS, latents(seed=10, shape=shape) if contrasts else None
    )


class MemoryCheckpoints(Checkpoints):
    """Checkpoints in memory."""

    def __init__(self, state=None):
        super().__init__("test", {})
        self.states = []
        self.state = state

    def save(self, state):
        self.states.append(state)

    def resume(self, name):
        return self.state


def action(**settings):
    return ActionTrainingConfig(**{"context_steps": 2, "initial_word": "dancing", **settings})


def config(**settings):
    return TrainingConfig(**{"steps": 3, "learning_rate": 1e-2, "checkpoint_every": 0, **settings})


def train(model=MODEL, clip=CLIP, pictures=None, settings=None, checkpoints=None, preview=None, **run):
    with torch.inference_mode():
        return training.train(
            model, clip, pictures or exemplars(), settings or action(), config(**run),
            checkpoints=checkpoints or MemoryCheckpoints(), resume_from="none", preview=preview,
        )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
