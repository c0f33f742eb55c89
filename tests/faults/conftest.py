"""A separate server for the fault tests, whose cache makes a changed prompt sample again."""

import shutil
from pathlib import Path

import pytest
from faults import prompts
from launcher.server import Server

TINY_VISION = Path(__file__).with_name("tiny_vision.py")


@pytest.fixture(scope="session")
def fault_server(comfy_path, tmp_path_factory):
    """A ComfyUI that caches only the last prompt's results, so that alternating prompts all sample.

    A second pack in it makes a tiny image encoder.
    """
    base = tmp_path_factory.mktemp("fault_server")
    (base / "custom_nodes").mkdir()
    shutil.copy(TINY_VISION, base / "custom_nodes")
    with Server(comfy_path, base, cpu=True, options=(TINY_VISION.name, "--cache-classic")) as server:
        assert prompts.CHECKPOINT in server.model_names("checkpoints"), (
            f"workflows/models/checkpoints/{prompts.CHECKPOINT} is missing or not listed: run its training script"
        )
        yield server
