"""The Training Doctor as ComfyUI calls it: lists of everything, with and without a model."""

import re

import pytest
import torch
from pack.nodes.training import picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training_doctor.nodes import UnderstudyTrainingDoctor
from support import fusions, tiny_clip, tiny_model

PICTURES = fusions.pictures(3)
CAPTIONS = "a robot on a beach\na robot in a forest\nrobots at night"
MODELS = {
    "model": tiny_model.as_loaded(tiny_model.picture()), "clip": tiny_clip.as_loaded(tiny_clip.clip()),
    "vae": fusions.autoencoder(),
}


def examine(images=(PICTURES,), captions=(CAPTIONS,), masks=None, **values):
    with torch.inference_mode():
        return UnderstudyTrainingDoctor.execute(
            images=list(images), captions=list(captions), masks=masks, **{name: [v] for name, v in values.items()}
        ).result


def test_findings_are_one_a_line_and_serious_ones_are_not_healthy():
    text, healthy = examine(captions=["a robot"])
    assert "all 3 say the same" in text.splitlines()[0] and healthy is False
    text, healthy = examine(masks=[torch.rand(3, 8, 8)])
    assert healthy is True and "captions" not in text
    assert "'beach'" in examine(learned_words="beach, forest")[0]


def test_a_mask_is_for_each_picture():
    assert "masks: 1, 2, 3 of 3 are empty" in examine(masks=[torch.zeros(2, 8, 8), torch.zeros(8, 8)])[0]
    with pytest.raises(ValueError, match="masks has 2 masks for 3 pictures"):
        examine(masks=[torch.ones(2, 8, 8)])


def test_a_lora_is_compared_with_its_base():
    with torch.inference_mode():
        latents = picture_training.encode_pictures(MODELS["vae"], [picture[None] for picture in PICTURES])
        texts = picture_training.encode_texts(MODELS["clip"], CAPTIONS.splitlines())
        lora, _ = picture_training.train_on_pictures(
            MODELS["model"], latents, texts, TrainingConfig(steps=30, learning_rate=1e-2, checkpoint_every=0),
            LoraConfig(rank=4), checkpoints=Checkpoints("test", {}), resume_from="none",
        )
    text, _ = examine(**MODELS, lora=lora)
    after, before = map(float, re.search(r"references ([\d.]+), and ([\d.]+) before", text).groups())
    assert after < before
    assert f"loss of the base model on these pictures {before:.4f}" in examine(**MODELS)[0]
    assert "captions hold {subject}" in examine(captions=["a {subject} at night"], **MODELS)[0]
    blank = {key: torch.zeros_like(weight) if weight.ndim else weight for key, weight in lora.items()}
    text, healthy = examine(**MODELS, lora=blank)
    assert "learned nothing" in text and healthy is False
    with pytest.raises(ValueError, match="connect clip and vae as well"):
        examine(model=MODELS["model"], lora=lora)
