"""Hostile, truncated and strange files are refused in bounded time and memory, measured in their own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import mutants

WORKER = Path(__file__).with_name("read_worker.py")
MEGABYTES = 200
SECONDS = 2


def read_all(paths: list[Path], base: Path) -> list[dict]:
    """The result of reading each file in one new process. A crash or a hang of that process is a failure."""
    run = subprocess.run(
        [sys.executable, str(WORKER), str(base)], input="".join(f"{path}\n" for path in paths),
        capture_output=True, text=True, timeout=120 + SECONDS * len(paths),
        env={**os.environ, "PYTHONPATH": ""},
    )
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0 and len(answers) == len(paths), (
        f"reading stopped with code {run.returncode} at {paths[len(answers) :][:1]}: {run.stderr[-2000:]}"
    )
    return answers


def write_all(files: list[mutants.Mutant], folder: Path) -> list[Path]:
    paths = []
    for index, (_, content) in enumerate(files):
        paths.append(folder / f"mutant_{index:03}.safetensors")
        paths[-1].write_bytes(content)
    return paths


def check(files: list[mutants.Mutant], folder: Path) -> list[dict]:
    answers = read_all(write_all(files, folder), folder)
    for (name, _), answer in zip(files, answers, strict=True):
        assert answer["error"], f"{name} was read"
        assert Path(answer["path"]).name in answer["error"], f"{name}: the message does not name the file"
        assert answer["megabytes"] < MEGABYTES, f"{name} took {answer['megabytes']:.0f} MB"
    return answers


def test_every_kind_of_hostile_file_is_refused_in_bounded_memory(tmp_path):
    check([*mutants.structural(), *mutants.seeded(21)], tmp_path)


@pytest.mark.soak
def test_two_hundred_hostile_files_are_refused_in_bounded_time_and_memory(tmp_path):
    files = list(mutants.structural())
    files += mutants.seeded(max(200 - len(files), 150), seed=3)
    answers = check(files, tmp_path)
    assert len(answers) >= 200
    assert max(answer["seconds"] for answer in answers) < SECONDS  # CPU seconds, however busy the machine is


def test_the_undamaged_files_are_read(tmp_path):
    """Without this, refusing everything would pass."""
    files = [("valid", mutants.build(*mutants.valid(seed))) for seed in range(7)]
    answers = read_all(write_all(files, tmp_path), tmp_path)
    assert [answer["error"] for answer in answers] == [None] * 7


def test_the_costliest_accepted_header_stays_in_bounded_memory(tmp_path):
    entries = b",".join(b'"%x":"abcdefgh"' % number for number in range(290_000))
    content = mutants.build(
        b'{"__metadata__":{' + entries + b'},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"
    )
    (answer,) = read_all(write_all([("many", content)], tmp_path), tmp_path)
    assert answer["error"] is None and answer["megabytes"] < MEGABYTES


def test_devices_pipes_folders_links_and_sparse_giants_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "memory.safetensors").symlink_to("/proc/self/mem")
    header = mutants.build({"a": mutants.tensor("U8", [1 << 40], 0, 1 << 40)})
    with open(tmp_path / "sparse.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 40))
    paths = [*sorted(tmp_path.glob("*.safetensors")), tmp_path / "absent.safetensors"]
    assert len(paths) == 7
    for answer in read_all(paths, tmp_path):
        assert answer["error"] and Path(answer["path"]).name in answer["error"]
        assert answer["megabytes"] < MEGABYTES
