"""Trainings of the experiments that are killed, and gone on with, end as one that was not."""

import copy

import folder_paths
import pytest
import torch
from experiments import trainings
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.runs import run


class Killed(BaseException):
    """Ends a run as a signal does."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where trainings are kept, with checkpoints every second step in an output folder of its own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "trained_0123"


def training(taken, killed_at=None):
    """A parameter that learns a number from noise; `taken` gets the steps that were computed."""

    def train(steps, kept, resume_from):
        parameter = torch.nn.Parameter(torch.zeros(3))

        def objective(step, generator):
            if step == killed_at:
                raise Killed
            taken.append(step)
            return (parameter - torch.randn(3, generator=generator)).square().sum()

        config = TrainingConfig(steps, 0.1, checkpoint_every=2)
        losses = run(
            objective, {"it": parameter}, config, torch.device("cpu"), checkpoints=kept,
            resume=kept.resume(resume_from),
        )
        return {"it": parameter.detach()}, {"loss": str(losses["loss"][-1])}

    return train


def test_a_killed_training_goes_on_and_ends_as_one_that_was_not(folder):
    whole, steps = [], []
    expected, _ = trainings.trained(folder, "whole", "a", 8, training(whole))
    with pytest.raises(Killed):
        trainings.trained(folder, "cut", "a", 8, training(steps, killed_at=5))
    found, metadata = trainings.trained(folder, "cut", "a", 8, training(steps))
    assert whole == list(range(8)) == steps and torch.equal(found["it"], expected["it"])
    assert metadata["steps"] == "8" and metadata["from"] == "5"
    again, _ = trainings.trained(folder, "cut", "a", 8, training(steps))
    assert len(steps) == 8 and torch.equal(again["it"], found["it"])


def test_a_longer_training_begins_where_a_shorter_one_ended_and_stops_are_kept(folder):
    steps = []
    short, _ = trainings.trained(folder, "rate", "a", 4, training(steps))
    longer, metadata = trainings.trained(folder, "rate", "a", 8, training(steps), stops=(4, 6))
    assert steps == list(range(8)) and metadata["from"] == "6" and not torch.equal(short["it"], longer["it"])
    assert torch.equal(trainings.trained(folder, "rate", "a", 4, training(steps))[0]["it"], short["it"])
    assert len(steps) == 8 and len(list(folder.glob("rate_*_6.safetensors"))) == 1


def test_other_settings_or_models_are_another_training(folder):
    steps = []
    trainings.trained(folder, "rate", "a", 2, training(steps))
    trainings.trained(folder, "rate", "b", 2, training(steps))
    trainings.trained(folder.with_name("trained_4567"), "rate", "a", 2, training(steps))
    assert steps == [0, 1] * 3
