"""Starts scripts in one process, or in two by accelerate, on the CPU with gloo between them."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--dynamo_backend", "no",
)


def start(script, *arguments, processes=1, precision="no", machine=None, **options) -> subprocess.Popen:
    """A process that runs this script; the terminal's output is in its `stdout`.

    Of two processes one is this machine's where `machine` is its rank and the port of rank 0.
    """
    machines = ["--num_machines", "1", "--main_process_port", "0"]
    if machine:
        rank, port = machine
        machines = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        machines += ["--main_process_port", str(port), "--rdzv_backend", "static"]
    launch = [*LAUNCH, *machines, "--mixed_precision", precision] if processes > 1 else []
    command = [sys.executable, *launch, str(script), *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def run(script, *arguments, code=0, **options) -> str:
    """What a script wrote. Fails unless it ended with this code."""
    process = start(script, *arguments, **options)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output[-4000:]
    return output
