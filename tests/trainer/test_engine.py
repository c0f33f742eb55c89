"""Trainings over processes: equal to one, killed and resumed, stopped by a death and by NaN in any of them."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
import types

import psutil
import pytest
import safetensors.torch
import torch
from accelerate.utils import DistributedType
from launcher.scripts import ROOT
from support import processes
from trainer import engine

RUNS = processes.SUPPORT / "parallel_runs.py"
FAULTS = processes.SUPPORT / "parallel_faults.py"
METHODS = ("prior", "combiner", "generator", "generator_by_paths", "adapter")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process, which computes whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    processes.run(RUNS, folder, 1, 0, *METHODS)
    return folder


def assert_equal(folder, other, methods):
    for name in methods:
        actual, expected = (safetensors.torch.load_file(path / f"{name}.safetensors") for path in (folder, other))
        assert actual.keys() == expected.keys()
        worst = max(float((actual[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-5, name  # in fp64; fp32's rounding would be amplified by AdamW


def test_two_processes_train_what_one_does(alone, tmp_path):
    processes.run(RUNS, tmp_path, 1, 0, *METHODS, processes=2)
    assert_equal(tmp_path, alone, METHODS)


def test_two_processes_that_stop_at_a_random_step_go_on_to_the_same_end(alone, tmp_path):
    processes.run(RUNS, tmp_path, 1, random.randint(1, 19), *METHODS, processes=2)
    assert_equal(tmp_path, alone, METHODS)


def test_accumulated_shares_train_what_whole_batches_do(alone, tmp_path):
    """Batches of 3 in 2 shares: of unequal size."""
    methods = [name for name in METHODS if name != "combiner"]
    processes.run(RUNS, tmp_path, 2, 0, *methods)
    assert_equal(tmp_path, alone, methods)
    assert "gradients cannot be accumulated" in processes.run(RUNS, tmp_path, 2, 0, "combiner", code=1)


def test_bf16_of_accelerate_trains_in_two_processes(tmp_path):
    """Beside one process in fp32: rounding to 8 bits shows, and the first losses are the same but for it."""
    losses = []
    for name, options in (("exact", {}), ("bf16", {"processes": 2, "precision": "bf16"})):
        (tmp_path / name).mkdir()
        processes.run(RUNS, tmp_path / name, 1, 0, "adapter", "--fp32", **options)
        losses.append(safetensors.torch.load_file(tmp_path / name / "adapter.safetensors")["losses"])
    exact, rounded = losses
    assert torch.isfinite(rounded).all() and (rounded[:2] - exact[:2]).abs().max() > 1e-5
    torch.testing.assert_close(rounded[:2], exact[:2], rtol=0.05, atol=0.05)


def test_two_machines_train_what_one_process_does(alone, tmp_path):
    """Two launchers with a process each, as on machines that see each other, with one folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        processes.start(RUNS, tmp_path, 1, 0, "combiner", machine=(rank, port), processes=2) for rank in range(2)
    ]
    for machine in machines:
        output, _ = machine.communicate(timeout=600)
        assert machine.returncode == 0, output[-4000:]
    assert_equal(tmp_path, alone, ["combiner"])


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_divides_what_is_trained_is_refused_in_words(kind, monkeypatch, tmp_path):
    made = types.SimpleNamespace(distributed_type=DistributedType[kind], mixed_precision="no")
    monkeypatch.setattr(engine, "Accelerator", lambda **_: made)
    with pytest.raises(ValueError, match="divides what is trained.*use accelerate's MULTI_GPU, and"):
        engine.accelerator(tmp_path, None)
    made.distributed_type = DistributedType.MULTI_GPU
    assert engine.accelerator(tmp_path, None) is made
    made.mixed_precision = "fp16"
    with pytest.raises(ValueError, match="mixed_precision is fp16, in which small gradients vanish"):
        engine.accelerator(tmp_path, None)


def test_the_start_tells_how_many_processes_there_are_and_that_more_were_asked_for():
    made = types.SimpleNamespace(num_processes=1, gradient_accumulation_steps=2, device=torch.device("cpu"))
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    (line,) = engine.started(made, launched)
    assert line == "Processes: 1, on cpu; parts of a step in each: 2"
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    _, warning = engine.started(made, launched | port)
    assert "asked for more and started one process: add --multi_gpu" in warning
    assert len(engine.started(made, port)) == 1, "started by others"
    made.num_processes = 2
    assert len(engine.started(made, launched | port | {"WORLD_SIZE": "2"})) == 1


def test_accelerate_starts_one_process_of_two_without_multi_gpu_and_the_start_tells(tmp_path):
    """By accelerate's own launcher, since its variables are what is looked at."""
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT / 'workflows')!r}]\n"
        "from launcher import scripts; scripts.alias_pack()\n"
        "from trainer import engine\n"
        "print(*engine.started(engine.accelerator(sys.argv[1], None)), sep='\\n')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    said = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert "Processes: 1, on cpu" in said and "started one process: add --multi_gpu" in said


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
    output = processes.run(FAULTS, tmp_path, "die", processes=2, code=1)
    died = json.loads((tmp_path / "died.json").read_text())
    assert time.time() - died < 60, "all have ended a minute after the death"
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
def test_a_run_that_is_killed_or_stopped_at_a_random_step_goes_on_to_the_same_end(number, tmp_path, uninterrupted):
    process = processes.start(FAULTS, tmp_path, "wait", processes=2)
    step, deadline = random.randint(1, 15), time.monotonic() + 300
    # A file after each step, with the next number.
    while not any(int(path.stem.split("_")[-2]) >= step for path in checkpoints(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGKILL:
        for part in [*psutil.Process(process.pid).children(recursive=True), process]:
            part.kill()
    else:
        process.send_signal(number)  # torchrun passes it on
    process.communicate(timeout=120)
    assert not (tmp_path / "result.safetensors").exists() and checkpoints(tmp_path), f"killed at step {step}"
    resumed(tmp_path, uninterrupted)
