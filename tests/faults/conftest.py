"""A server of their own for the fault tests, with a cache that runs a changed prompt's sampler again."""

import pytest
from faults import prompts
from launcher.server import Server


@pytest.fixture(scope="session")
def fault_server(comfy_path, tmp_path_factory):
    """ComfyUI that remembers the last prompt's results only, so that prompts in turn all sample."""
    base = tmp_path_factory.mktemp("fault_server")
    with Server(comfy_path, base, cpu=True, options=("--cache-classic",)) as server:
        assert prompts.CHECKPOINT in server.model_names("checkpoints"), (
            f"workflows/models/checkpoints/{prompts.CHECKPOINT} is missing or not listed: run its training script"
        )
        yield server


@pytest.fixture
def fresh_server(comfy_path, tmp_path):
    """A server that keeps no freed memory of earlier prompts, which would be more than a limit says."""
    with Server(comfy_path, tmp_path, cpu=True, options=("--cache-classic",)) as server:
        yield server
