"""Runs the test suite: `python tests/run.py [pytest arguments]`; `--soak` adds the long tests.

The first start makes an environment and gets ComfyUI (see workflows/launcher); later starts take seconds. The whole
suite runs in one process per core, at most four; tests that you name run in one process.
"""

import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.append(str(ROOT / "workflows"))

from launcher import environment  # noqa: E402

_ALONE = ("-n", "-s", "--pdb", "--trace")  # set the number of processes, or need a terminal


def side_by_side(arguments: list[str]) -> list[str]:
    """Options that make pytest run the whole suite in parallel; none if tests or a number of processes are named."""
    named = any(not argument.startswith("-") or argument.startswith(_ALONE) for argument in arguments)
    return [] if named else ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]


if __name__ == "__main__":
    environment.enter(ROOT)
    os.chdir(str(ROOT))
    environment.become([sys.executable, "-m", "pytest", *side_by_side(sys.argv[1:]), *sys.argv[1:]])
