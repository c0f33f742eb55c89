"""Starts scripts in one process, or in two by accelerate, on the CPU with gloo between them."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)


def start(script, *arguments, processes=1, **options) -> subprocess.Popen:
    """A process that runs this script; the terminal's output is in its `stdout`."""
    command = [sys.executable, *(LAUNCH if processes > 1 else ()), str(script), *map(str, arguments)]
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
