"""Saves weight files in a process that can be killed.

    save_worker.py BASE many COUNT VALUE     COUNT files under one name; prints each path
    save_worker.py BASE kill STAGE ...       one process per STAGE, killed there: a step of saving, each in an
                                             output folder of that name, or milliseconds, all in `output`
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "workflows"))

from launcher import scripts  # noqa: E402

scripts.alias_pack()
scripts.add_comfy_path(Path(sys.argv[1]))

import folder_paths  # noqa: E402
import torch  # noqa: E402
from pack.nodes.files import publishing, weights  # noqa: E402

MEBIBYTES = 4


def save(value: int) -> Path:
    """A file whose every element is `value`, which its metadata repeats."""
    weight = torch.full((MEBIBYTES << 18,), float(value))
    return weights.save({"weight": weight}, {"value": str(value)}, "loras", "anna")


def die(*_arguments, **_options) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def then_die(function: Callable) -> Callable:
    return lambda *arguments, **options: (function(*arguments, **options), die())


STAGES: dict[str, Callable[[], None]] = {
    "created": lambda: setattr(publishing, "_lock", die),
    "written": lambda: setattr(os, "fsync", die),
    "synced": lambda: setattr(weights, "validate", die),
    "checked": lambda: setattr(os, "link", die),
    "linked": lambda: setattr(os, "link", then_die(os.link)),
    "folder synced": lambda: setattr(publishing, "_sync_folder", then_die(publishing._sync_folder)),
    "removed": lambda: setattr(Path, "unlink", then_die(Path.unlink)),
}


def kill_at(stage: str, value: int) -> None:
    child = os.fork()
    if child == 0:
        if stage in STAGES:
            folder_paths.set_output_directory(str(Path(sys.argv[1]) / stage))
            STAGES[stage]()
        while True:
            save(value)
    if stage not in STAGES:
        time.sleep(float(stage) / 1000)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(stage, os.WTERMSIG(status) == signal.SIGKILL, flush=True)


torch.set_num_threads(1)  # a forked process has none of its parent's threads
if sys.argv[2] == "many":
    for _ in range(int(sys.argv[3])):
        print(save(int(sys.argv[4])), flush=True)
else:
    for number, name in enumerate(sys.argv[3:]):
        kill_at(name, number)
