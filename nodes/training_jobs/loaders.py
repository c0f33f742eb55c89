"""The nodes that a graph loads a model with, as nested values that another program can run again."""

from collections.abc import Collection, Mapping
from typing import Any


def loader(prompt: Mapping[str, Any], node_id: str, name: str, refused: Collection[str]) -> dict[str, Any]:
    """The nodes above the socket `name` of a node in ComfyUI's prompt: class, output's number, inputs of each.

    Raises ValueError, naming the input, where the graph does not show them, or one is of the classes `refused`.
    """
    return _above(prompt, prompt.get(node_id, {}).get("inputs", {}).get(name), name.rpartition(".")[2], refused)


def _above(prompt: Mapping[str, Any], link: Any, name: str, refused: Collection[str]) -> dict[str, Any]:
    if not is_link(link) or link[0] not in prompt:
        raise ValueError(
            f"{name} comes from a node that the graph does not show, so the job cannot load it again: connect a node "
            "that loads it, outside of a loop"
        )
    node = prompt[link[0]]
    if node["class_type"] in refused:
        raise ValueError(
            f"{name} comes from a training, which the job would do again: save its result, and connect the node that "
            "loads the file"
        )
    inputs = {
        key: _above(prompt, value, key, refused) if is_link(value) else value for key, value in node["inputs"].items()
    }
    return {"node": node["class_type"], "output": link[1], "inputs": inputs}


def is_link(value: Any) -> bool:
    """Whether a value in a prompt is an output of another node."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
