"""Words for the person at the browser: a line in the log and, while a node runs, a text on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.utils import get_executing_context

# The lines of the node that spoke last, in its run: ComfyUI shows one text per node, the latest.
_said: dict[tuple[str, str], list[str]] = {}


def tell(node: str, lines: Sequence[str], level: int = logging.INFO) -> None:
    """Log each line under the node's name, and show them on the running node, below what it said before."""
    for line in lines:
        logging.log(level, "[Understudy] %s: %s", node, line)
    running = get_executing_context()
    if lines and running is not None:
        from server import PromptServer  # only a server that runs a graph has one

        run = running.prompt_id, running.node_id
        all_of_it = list(dict.fromkeys([*_said.get(run, ()), *lines]))  # a list of pictures says the same of each
        _said.clear()
        _said[run] = all_of_it
        PromptServer.instance.send_progress_text("\n".join(all_of_it), running.node_id)
