"""Folders into which ComfyUI may not write, not as root: said before anything runs, and nothing stays."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import folder_paths
import pytest
import torch
from pack.nodes.extension import METHOD_NODES
from pack.nodes.files import publishing, weights
from pack.nodes.provenance import files as media
from pack.nodes.training import previews
from pack.nodes.training.widgets import SaveNode
from pack.nodes.training_jobs.folder import JobFolder
from support import labels

NOBODY = 65534
FIX = "Let the user who runs ComfyUI write there, or choose another folder"
WEIGHT = {"weight": torch.zeros(1)}
SAVING = [node for node in METHOD_NODES if issubclass(node, SaveNode)]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows keeps folders by lists of users")


@pytest.fixture
def output(monkeypatch):
    """ComfyUI's output folder, which everybody may enter, and the temporary one beside it."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    for name in ("output", "temp"):
        (base / name).mkdir()
        (base / name).chmod(0o777)
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(base / name))
    yield base / "output"
    shutil.rmtree(base)


@contextlib.contextmanager
def locked(folder):
    """The folder can be read alone, also by root, who is another user meanwhile."""
    folder.mkdir(exist_ok=True, parents=True)
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def everything(folder):
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("inside", ["", "loras", "loras/people"])
def test_a_weight_file_in_a_locked_folder_is_refused_in_words(output, inside):
    (output / inside).mkdir(parents=True, exist_ok=True)
    before = everything(output)
    with locked(output / inside):
        with pytest.raises(PermissionError) as raised:
            weights.save(WEIGHT, {}, "loras", "people/anna")
        known = publishing.obstacle("loras", "people/anna")
    assert everything(output) == before
    for message in (str(raised.value), known):
        assert "'people/anna' could not be saved in" in message and str(output / "loras") in message
        assert message.endswith(FIX) and "Permission denied" in message
    assert known.split(". ")[0].endswith(str(output / inside) if inside else str(output))  # the locked one


def test_what_can_be_written_has_no_obstacle_and_is_not_made(output):
    for prefix in ("anna", "loras/anna", "people/anna", None):
        assert publishing.obstacle("loras", prefix) == ""
    assert everything(output) == []
    (output / "loras").mkdir()
    (output / "loras" / "people").touch()
    assert "Not a directory" in publishing.obstacle("loras", "people/anna")
    assert "points outside the output folder" in publishing.obstacle("loras", "../anna")


@pytest.mark.parametrize("node", SAVING, ids=lambda node: node.__name__)
def test_save_nodes_are_asked_before_a_training(output, node):
    folder = output / node.FOLDER.name
    assert node.validate_inputs("anna") is True and node.validate_inputs() is True
    with locked(folder):
        assert node.validate_inputs("anna").endswith(FIX)
        assert str(folder) in node.validate_inputs()


def test_every_node_that_saves_is_asked(output):
    saving = {"SaveIdentityPrior", "SaveActionIdentifier", "SaveFusion", "SaveVideoIdentityAdapter"}
    assert {node.__name__.removeprefix("Understudy") for node in SAVING} == saving
    (action,) = (node for node in SAVING if "Action" in node.__name__)
    (label,) = (node for node in METHOD_NODES if node.__name__ == "UnderstudyLabelMedia")
    with locked(output / "embeddings"):
        assert action.validate_inputs("anna") is True and label.validate_inputs("anna") is True
        assert str(output / "embeddings") in action.validate_inputs("anna", textual_inversion=True)
    with locked(output):
        assert label.validate_inputs("anna").endswith(FIX)


def test_a_preview_that_cannot_be_written_only_warns(output, caplog):
    path = weights.save(WEIGHT, {}, "loras", "anna")
    with locked(output / "loras"):
        assert previews.save_with("Save", lambda: path, torch.rand(1, 8, 8, 3)) == path
    assert "anna_00001_.preview.png could not be written: Permission denied" in caplog.text


def test_a_job_in_a_locked_folder_is_refused_in_words(output):
    with locked(output / "training_jobs"), pytest.raises(PermissionError, match=f"'job_00001' could not .*{FIX}"):
        JobFolder("job")


@pytest.mark.parametrize("what", ["write_texts", "write_tensors"])
def test_of_a_job_that_cannot_be_written_to_its_end_nothing_stays(output, monkeypatch, what):
    job = JobFolder("job")
    job.write_pictures("images", [torch.rand(1, 8, 8, 3)])

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"write_texts": (Path, "write_text"), "write_tensors": (os, "fsync")}[what], full)
    item = "a" if what == "write_texts" else (WEIGHT, {})
    with pytest.raises(OSError, match="could not be saved in .*Free some space") as raised, job.whole():
        getattr(job, what)("more", [item])
    assert str(raised.value).count("could not be saved") == 1 and raised.value.errno == errno.ENOSPC
    assert everything(output) == [output / "training_jobs"]


def test_a_video_that_cannot_be_encoded_in_the_temporary_folder_says_which(output):
    with locked(output.parent / "temp"), pytest.raises(PermissionError, match=f"temp', so nothing .*{FIX}"):
        media.encode_video(labels.video(), {}, b"")
