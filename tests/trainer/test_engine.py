"""Trainings over processes: equal to one, killed and resumed, stopped by a death and by NaN in any of them."""

import signal
import time

import psutil
import pytest
import safetensors.torch
import torch
from support import processes

RUNS = processes.SUPPORT / "parallel_runs.py"
FAULTS = processes.SUPPORT / "parallel_faults.py"
METHODS = ("prior", "combiner", "generator", "adapter")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process, which computes whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    processes.run(RUNS, folder, 1, *METHODS)
    return folder


def assert_equal(folder, other, methods):
    for name in methods:
        actual, expected = (safetensors.torch.load_file(path / f"{name}.safetensors") for path in (folder, other))
        assert actual.keys() == expected.keys()
        worst = max(float((actual[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-5, name  # in fp64; fp32's rounding would be amplified by AdamW


def test_two_processes_train_what_one_does(alone, tmp_path):
    processes.run(RUNS, tmp_path, 1, *METHODS, processes=2)
    assert_equal(tmp_path, alone, METHODS)


def test_accumulated_shares_train_what_whole_batches_do(alone, tmp_path):
    """Batches of 3 in 2 shares: of unequal size."""
    methods = [name for name in METHODS if name != "combiner"]
    processes.run(RUNS, tmp_path, 2, *methods)
    assert_equal(tmp_path, alone, methods)
    assert "gradients cannot be accumulated" in processes.run(RUNS, tmp_path, 2, "combiner", code=1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    processes.run(FAULTS, folder, processes=2)
    return safetensors.torch.load_file(folder / "result.safetensors")


def checkpoints(folder):
    return sorted((folder / "output" / "training_checkpoints").glob("*.safetensors"))


def resumed(folder, uninterrupted):
    processes.run(FAULTS, folder, processes=2)
    result = safetensors.torch.load_file(folder / "result.safetensors")
    assert all(torch.equal(result[key], uninterrupted[key]) for key in uninterrupted)


def test_a_process_that_dies_stops_all_with_a_message_and_the_run_goes_on_later(tmp_path, uninterrupted):
    started = time.monotonic()
    output = processes.run(FAULTS, tmp_path, "die", processes=2, code=1)
    assert time.monotonic() - started < 60 + 120, "a minute, beside the start of a busy machine"
    assert "rank      : 1" in output and "SIGKILL" in output
    assert not (tmp_path / "result.safetensors").exists()
    resumed(tmp_path, uninterrupted)


def test_nan_in_one_process_stops_all_and_saves_nothing_of_it(tmp_path):
    output = processes.run(FAULTS, tmp_path, "nan", processes=2, code=1)
    assert "the loss became nan at step 12 of 30" in output
    (last,) = checkpoints(tmp_path)
    tensors = safetensors.torch.load_file(last)
    assert len(tensors["losses"]) == 11 and all(torch.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_or_stopped_goes_on_to_the_same_end(number, tmp_path, uninterrupted):
    process = processes.start(FAULTS, tmp_path, "wait", processes=2)
    deadline = time.monotonic() + 300
    while not checkpoints(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGKILL:
        for part in [*psutil.Process(process.pid).children(recursive=True), process]:
            part.kill()
    else:
        process.send_signal(number)  # torchrun passes it on
    process.communicate(timeout=120)
    assert not (tmp_path / "result.safetensors").exists() and len(checkpoints(tmp_path)) >= 1
    resumed(tmp_path, uninterrupted)
