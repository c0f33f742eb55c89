"""Checkpoints on disk, and what a run says that has to continue from one."""

import copy
import errno
import logging
from pathlib import Path

import folder_paths
import pytest
import torch
from pack.nodes.files import weights
from pack.nodes.training import checkpoints, inputs
from pack.nodes.training.loop import State

SETTINGS = {"pictures": inputs.digest([torch.zeros(1)]), "rank": 4, "learning_rate": 1e-3}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint of seven steps, in a temporary folder."""
    known = copy.deepcopy(folder_paths.folder_names_and_paths)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    checkpoints.FOLDER.register()
    run = checkpoints.Checkpoints("name", SETTINGS)
    run.save(State(7, [0.5] * 7, {"parameter.a": torch.ones(2)}))
    return run


def test_every_setting_that_differs_is_named_at_once(saved):
    other = {**SETTINGS, "pictures": inputs.digest([torch.ones(1)]), "rank": "whole UNet", "learning_rate": 1e-4}
    with pytest.raises(ValueError, match="learning_rate 0.001 and .* 0.0001; different pictures; rank 4 and"):
        checkpoints.Checkpoints("name", other).resume(saved.path.name)


def test_a_setting_that_one_of_them_lacks_shows_no_digest(saved):
    with pytest.raises(ValueError, match="made with different model: ") as refused:
        checkpoints.Checkpoints("name", {**SETTINGS, "model": inputs.digest([torch.ones(1)])}).resume(saved.path.name)
    assert "None" not in str(refused.value)


def test_a_run_from_before_there_was_a_choice_had_no_decay_and_adamw(saved):
    now = {**SETTINGS, "decay": 0.0, "optimizer": "AdamW"}
    assert checkpoints.Checkpoints("name", now).resume(saved.path.name).step == 7
    differing = r"decay 0\.0 and this run has 0\.5; optimizer 'AdamW' and this run has 'Muon'"
    with pytest.raises(ValueError, match=differing):
        checkpoints.Checkpoints("name", {**SETTINGS, "decay": 0.5, "optimizer": "Muon"}).resume(saved.path.name)


def test_a_setting_that_one_of_them_lacks_is_called_unset(saved):
    with pytest.raises(ValueError, match="made with steps unset and this run has 4: "):
        checkpoints.Checkpoints("name", {**SETTINGS, "steps": 4}).resume(saved.path.name)
    with pytest.raises(ValueError, match="made with rank 4, unset in this run: "):
        checkpoints.Checkpoints("name", {k: v for k, v in SETTINGS.items() if k != "rank"}).resume(saved.path.name)


def test_a_seed_as_long_as_a_digest_is_shown(saved):
    long = checkpoints.Checkpoints("long", {**SETTINGS, "seed": 1125899906842624})
    long.save(State(1, [0.5], {"parameter.a": torch.ones(2)}))
    with pytest.raises(ValueError, match="seed 1125899906842624 and this run has 7"):
        checkpoints.Checkpoints("long", {**SETTINGS, "seed": 7}).resume(long.path.name)


def test_a_checkpoint_of_another_node_is_refused_by_name(saved):
    with pytest.raises(ValueError, match="another training, name: choose one .* begins with other, or .* to none"):
        checkpoints.Checkpoints("other", {"epochs": 3}).resume(saved.path.name)


def test_a_checkpoint_from_before_seeds_went_by_purpose_is_refused_in_words(saved):
    tensors, metadata = weights.read(saved.path)
    del metadata["seeds"]
    older = weights.save(tensors, metadata, checkpoints.FOLDER.name, "older")
    with pytest.raises(ValueError, match="earlier version of this node.*set resume_from to none and train again"):
        checkpoints.Checkpoints("name", SETTINGS).resume(older.name)


def test_a_checkpoint_that_is_open_elsewhere_stays_and_the_next_is_whole(saved, monkeypatch, caplog):
    """Windows deletes no open file: the run has its newer state, and says which older one stays."""
    first, unlink, locked = saved.path, Path.unlink, {saved.path}

    def delete(path, missing_ok=False):
        if path in locked:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", delete)
    saved.save(State(8, [0.5] * 8, {"parameter.a": torch.ones(2)}))
    assert f"the earlier checkpoint {first.name} stays" in caplog.text and "cannot access" in caplog.text
    assert saved.path != first and saved.resume(saved.path.name).step == 8 and saved.resume(first.name).step == 7
    saved.save(State(9, [0.5] * 9, {"parameter.a": torch.ones(2)}))
    assert checkpoints.choices() == ["none", first.name, saved.path.name]


def test_the_log_names_the_checkpoint(saved, caplog):
    with caplog.at_level(logging.INFO):
        saved.save(State(9, [0.5] * 9, {"parameter.a": torch.ones(2)}))
    assert f"checkpoint {saved.path.name} after optimiser step 9" in caplog.text
    assert saved.resume(saved.path.name).step == 9
