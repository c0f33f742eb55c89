"""Gradients through networks that add in place, against finite differences; those that are wrong are refused."""

import pytest
import torch
from pack.nodes.training import picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.session import session
from support import family_gradients, family_models, family_relatives

FAMILIES = {family.name: family for family in family_relatives.EVERY}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", [
    "Flux.1", "Flux.2", "Chroma", "Hunyuan Video", "Krea 2", "SD 3.5", "LTX-Video", "SD x4 Upscaler",
])
def test_gradients_are_the_differences_of_the_loss(name, checkpointing):
    family = FAMILIES[name]
    if name == "LTX-Video" and checkpointing:
        config = TrainingConfig(steps=1, learning_rate=1e-3, gradient_checkpointing=True)
        with pytest.raises(ValueError, match="gradient_checkpointing or offload is on, and LTX-Video"):
            with session(family_models.build(family), family.shape, config):
                pass
    else:
        family_gradients.check(family, family_models.build(family), checkpointing)


@pytest.mark.parametrize(("name", "message"), [
    ("HiDream O1", "model is HiDream O1.*keeps what it computed"), ("Wan FlowRVS", "such as Wan FlowRVS"),
    ("ERNIE-Image", "model is ERNIE-Image.*no backward pass"), ("Anima", "model is Anima.*no backward pass"),
    ("PixelDiT", "model is PixelDiT.*no backward pass"), ("LTX 2", "model is LTX 2.*video and sound in one"),
    ("CogVideoX", "such as CogVideoX"),
])
def test_what_cannot_be_trained_is_refused_by_name(name, message):
    family = FAMILIES[name]
    with pytest.raises(ValueError, match=message):
        picture_training.train_on_pictures(
            family_models.build(family), [torch.randn(family.shape)], [family_models.conditioning(family, 1)],
            TrainingConfig(steps=1, learning_rate=1e-3), LoraConfig(rank=2), checkpoints=Checkpoints("test", {}),
            resume_from="none",
        )
