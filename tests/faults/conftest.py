"""A separate server for the fault tests, whose cache makes a changed prompt sample again."""

import pytest
from faults import prompts
from launcher.server import Server


@pytest.fixture(scope="session")
def fault_server(comfy_path, tmp_path_factory):
    """A ComfyUI that caches only the last prompt's results, so that alternating prompts all sample."""
    base = tmp_path_factory.mktemp("fault_server")
    with Server(comfy_path, base, cpu=True, options=("--cache-classic",)) as server:
        assert prompts.CHECKPOINT in server.model_names("checkpoints"), (
            f"workflows/models/checkpoints/{prompts.CHECKPOINT} is missing or not listed: run its training script"
        )
        yield server
