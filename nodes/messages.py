"""Words for the person at the browser: a line in the log and, while a node runs, a text on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context


def tell(node: str, lines: Sequence[str], level: int = logging.INFO) -> None:
    """Log each line under the node's name, and show them all on the running node, as the host's API nodes do."""
    for line in lines:
        logging.log(level, "Understudy, %s: %s", node, line)
    running = get_executing_context()
    if lines and running is not None:
        from server import PromptServer  # only a host that runs a graph has one

        PromptServer.instance.send_progress_text("\n".join(lines), running.node_id)
