"""Makes the pack importable as `pack` beside ComfyUI (on the CPU), and starts one headless server for all tests."""

import atexit
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

_TESTS = Path(__file__).parent
sys.path += [str(_TESTS), str(_TESTS.parent / "workflows")]

from launcher import scripts  # noqa: E402
from launcher.server import Server  # noqa: E402

scripts.alias_pack()
_BASE = Path(tempfile.mkdtemp(prefix="understudy-tests-"))
atexit.register(shutil.rmtree, str(_BASE), ignore_errors=True)
_COMFYUI = scripts.add_comfy_path(_BASE)

import torch  # noqa: E402

_SHARE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 2))
_THREADS = max(1, min(4, (os.cpu_count() or 2) // _SHARE))
torch.set_num_threads(_THREADS)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(_THREADS)  # for the servers that tests start
SLOW = ("workflows", "trainer", "faults", "launcher")  # folders of tests
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="also run the long tests marked `soak`")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        # The files that start servers and browsers first, then the longer ones, so that the processes end together.
        count = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.parent.name not in SLOW, -count[item.path], item.path))
    if config.getoption("--soak"):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(scope="session")
def pack_root() -> Path:
    """The pack's folder."""
    return scripts.ROOT


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """ComfyUI's folder. Never write to it."""
    return _COMFYUI


@pytest.fixture(scope="session")
def server():
    """One headless ComfyUI on the CPU with this pack, for every end-to-end test."""
    with Server(_COMFYUI, _BASE / "server", cpu=True) as running:
        yield running
