"""What a method tells of a finished sampling run, and whether the running graph asks for it: Explain Result does.

A method whose runs can be explained attaches an object with `explain(samples) -> Explanation` to its model. It
records only where `is_asked()`; ComfyUI would reuse samples that were made before somebody asked, so the node that
patches the model has `fingerprint()` among what it depends on.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context

NODE = "UnderstudyExplain"
_REMEMBERED_RUNS = 4


@dataclass(frozen=True)
class Panel:
    """A table of maps with a label for each row and column: cells [R, C, h, w], from 0 to `highest`."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: torch.Tensor
    highest: float = 1.0


@dataclass(frozen=True)
class Explanation:
    """What is drawn, and the same in words, with what it cost."""

    title: str
    panels: Sequence[Panel]
    lines: Sequence[str]


class Runs:
    """What was recorded of the last runs, by the samples that they made."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Any] = OrderedDict()

    def add(self, samples: torch.Tensor, record: Any) -> None:
        """Remember the record of the run that made `samples`, and forget the oldest."""
        self._records[samples_digest(samples)] = record
        while len(self._records) > _REMEMBERED_RUNS:
            self._records.popitem(last=False)

    def of(self, samples: torch.Tensor) -> Any:
        """The record of the run that made `samples`. Raises ValueError, naming the fix."""
        record = self._records.get(samples_digest(samples))
        if record is None:
            raise ValueError(
                f"samples are not what this model's sampler made, or older than its last {_REMEMBERED_RUNS} runs: "
                "connect the sampler's latent to `samples`, and the sampler's model to `model`"
            )
        return record


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 to count - 1: the first, the last and some evenly between."""
    number = min(count, most)
    return [round(i * (count - 1) / max(1, number - 1)) for i in range(number)]


def samples_digest(samples: torch.Tensor) -> str:
    """A name for these samples, which tells whether a run made them."""
    return hashlib.sha256(samples.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def is_asked() -> bool:
    """Whether Explain Result takes, directly or through others, what the running node makes."""
    running = get_executing_context()
    if running is None:
        return False
    prompt = _prompts().get(running.prompt_id, {})
    asking = [node["inputs"].get("samples") for node in prompt.values() if node["class_type"] == NODE]
    seen: set[str] = set()
    while asking:
        link = asking.pop()
        if is_link(link) and link[0] in prompt and link[0] not in seen:  # other lists are values, say of an API
            seen.add(link[0])
            asking.extend(prompt[link[0]]["inputs"].values())
    # A node that another one made while the graph ran is not in the graph as it was sent.
    return running.node_id in seen or bool(seen) and running.node_id not in prompt


def fingerprint() -> str:
    """What the node that patches a model returns from `fingerprint_inputs`: its samples are made again when Explain
    Result comes into the graph or leaves it.
    """
    nodes = (node for prompt in _prompts().values() for node in prompt.values())
    return "explained" if any(node["class_type"] == NODE for node in nodes) else ""


def _prompts() -> dict[str, Mapping[str, Mapping]]:
    """The graphs that ComfyUI runs now, by their id."""
    from server import PromptServer  # exists only where ComfyUI runs a graph

    running, _ = PromptServer.instance.prompt_queue.get_current_queue()
    return {item[1]: item[2] for item in running}
