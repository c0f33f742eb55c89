"""Saving weight files with kills, full disks and two processes at once."""

import errno
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from pack.nodes.files import publishing, weights

WORKER = Path(__file__).with_name("save_worker.py")
STAGES = ["created", "written", "synced", "checked", "linked", "folder synced", "removed"]


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output" / "loras").mkdir(parents=True)
    return tmp_path / "output" / "loras"


def start(base: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(base), *arguments], stdout=subprocess.PIPE, text=True,
        env=environment,
    )


def check_whole(folder: Path) -> int:
    """Read every weight file of the folder and return their number; all values must equal the one in the metadata."""
    paths = list(folder.glob("*.safetensors"))
    for path in paths:
        tensors, metadata = weights.read(path)
        assert (tensors["weight"] == float(metadata["value"])).all(), path
    return len(paths)


def kill(output: Path, stages: list[str]) -> None:
    worker = start(output.parent.parent, "kill", *stages)
    answers, _ = worker.communicate(timeout=60 + 5 * len(stages))
    assert worker.returncode == 0
    assert answers.splitlines() == [f"{stage} True" for stage in stages]


def test_kill_at_each_step_of_saving_leaves_a_whole_file_or_none(output, monkeypatch):
    kill(output, STAGES)
    for stage in STAGES:
        monkeypatch.setattr(folder_paths, "output_directory", str(output.parent.parent / stage))
        folder = output.parent.parent / stage / "loras"
        whole = check_whole(folder)
        assert whole == (stage in ("linked", "folder synced", "removed")), stage
        assert len(list(folder.iterdir())) == whole + (stage != "removed"), stage
        saved = weights.save({"weight": torch.zeros(1)}, {"value": "0"}, "loras", "anna")
        assert saved.name == f"anna_{whole + 1:05}_.safetensors"
        assert len(list(folder.iterdir())) == whole + 1, stage  # what the kill left is swept


def milliseconds(count: int) -> list[str]:
    generator = random.Random(count)
    return [f"{generator.uniform(1, 60):.1f}" for _ in range(count)]


def test_kills_at_random_moments_tear_no_file(output):
    kill(output, milliseconds(6))
    check_whole(output)


@pytest.mark.soak
def test_fifty_kills_at_random_moments_tear_no_file(output):
    kill(output, milliseconds(50))
    assert check_whole(output) > 0  # some saves were complete before their kill
    weights.save({"weight": torch.zeros(1)}, {"value": "0"}, "loras", "anna")
    assert list(output.glob(".understudy-*")) == []


def test_two_processes_on_one_name_lose_and_cross_nothing(output):
    workers = [start(output.parent.parent, "many", "15", str(value)) for value in (1, 2)]
    paths = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert [len(process_paths) for process_paths in paths] == [15, 15]
    assert {Path(path).name for process_paths in paths for path in process_paths} == {
        f"anna_{number:05}_.safetensors" for number in range(1, 31)
    }
    assert check_whole(output) == 30
    for value, process_paths in zip(("1", "2"), paths, strict=True):
        assert {weights.read(path)[1]["value"] for path in process_paths} == {value}
    assert len(list(output.iterdir())) == 30


def test_the_sweep_spares_a_file_that_is_being_written(output):
    held, descriptor = publishing._open_temporary(output)
    weights.save({"weight": torch.zeros(1)}, {}, "loras", "anna")
    assert held.exists()
    os.close(descriptor)
    weights.save({"weight": torch.zeros(1)}, {}, "loras", "anna")
    assert not held.exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("step", ["write", "fsync", "open"])
def test_a_full_disk_is_said_and_leaves_nothing_behind(output, monkeypatch, step):
    tensors = {"weight": torch.zeros(1 << 18)}
    weights.save(tensors, {}, "loras", "anna")
    before = snapshot(output)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if step == "write":  # a real failure in the middle of a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    else:
        monkeypatch.setattr(os, step, full)
    try:
        message = r"'anna' could not be saved in .*loras.*nothing was written"
        with pytest.raises(OSError, match=message) as caught:
            weights.save(tensors, {}, "loras", "anna")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert caught.value.errno == (errno.EFBIG if step == "write" else errno.ENOSPC)
    assert snapshot(output) == before


def test_a_folder_that_cannot_be_written_is_said(output):
    (output / "people").touch()
    with pytest.raises(OSError, match="could not be saved"):
        weights.save({"weight": torch.zeros(1)}, {}, "loras", "people/anna")


def test_a_disk_without_hard_links_still_overwrites_nothing(output, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (output / "anna_00002_.safetensors").write_bytes(b"someone's")
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: (str(output), "anna", 1, "", "anna"))
    names = [weights.save({"weight": torch.zeros(1)}, {"value": "0"}, "loras", "anna").name for _ in range(2)]
    assert names == ["anna_00001_.safetensors", "anna_00003_.safetensors"]
    assert (output / "anna_00002_.safetensors").read_bytes() == b"someone's"
    assert len(list(output.iterdir())) == 3
