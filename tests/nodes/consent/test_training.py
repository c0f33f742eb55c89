"""Consent in the training that has no Save node of the pack: checked, and said that its file will not hold it."""

import pytest
import torch
from pack.nodes.consent.record import ConsentError, ConsentRecord
from pack.nodes.frequency_guidance.training_nodes import UnderstudyTrainSourceDrivingPair
from support import tiny_clip, tiny_model


class Cells:
    """An encoder of eight pixels per cell."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, picture):
        return torch.cat([picture, picture[..., :1]], -1)[:, ::8, ::8].movedim(-1, 1)


def train(**inputs):
    values = {
        "model": tiny_model.picture(), "clip": tiny_clip.clip(), "vae": Cells(), "source": torch.rand(1, 64, 64, 3),
        "driving": torch.rand(1, 64, 64, 3), "source_text": "a cat", "driving_text": "a dog", "steps": 1, "rank": 2,
        "learning_rate": 1e-3, "seed": 0, "resume_from": "none", "checkpoint_every": 0, **inputs,
    }
    with torch.inference_mode():
        return UnderstudyTrainSourceDrivingPair.execute(**{name: [value] for name, value in values.items()}).result


def test_it_says_that_the_file_will_hold_no_record(output, caplog):
    train()
    assert "consent" not in caplog.text
    train(consent=ConsentRecord("Anna", ("private",)))
    assert "the LoRA's file will hold no consent record" in caplog.text
    assert "consent of Anna is for private, and not for training" in caplog.text


def test_where_consent_is_required_it_stops_before_it_trains(output, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", "1")
    with pytest.raises(ConsentError, match="there is no consent record: connect a Consent Record for training"):
        train()
    assert train(consent=ConsentRecord("Anna", ("training",)))[1]["loss"]
