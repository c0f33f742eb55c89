"""Messages to the user: a line in the log and, while a node runs, a text on that node; and pictures on it."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context

# The lines of the node that showed some last, in its run: ComfyUI shows only the latest text of each node.
_shown: dict[tuple[str, str], list[str]] = {}


def tell(node: str, lines: Sequence[str], level: int = logging.INFO) -> None:
    """Log each line under the node's name, and show them on the running node, below its earlier lines."""
    for line in lines:
        logging.log(level, "[Understudy] %s: %s", node, line)
    running = get_executing_context()
    if lines and running is not None:
        from server import PromptServer  # exists only where ComfyUI runs a graph

        run = running.prompt_id, running.node_id
        all_lines = list(dict.fromkeys([*_shown.get(run, ()), *lines]))  # each picture of a list may repeat a line
        _shown.clear()
        _shown[run] = all_lines
        PromptServer.instance.send_progress_text("\n".join(all_lines), running.node_id)


def pictures(node: str, images: torch.Tensor, cls: Any) -> ui.PreviewImage | None:
    """Images [B, H, W, 3] to show on the node; None, and the node says why, where they cannot be written, since its
    result does not depend on them.
    """
    try:
        return ui.PreviewImage(images, cls=cls)
    except OSError as error:
        tell(node, [f"its pictures cannot be shown here, and its outputs are whole: {error}"], logging.WARNING)
        return None
