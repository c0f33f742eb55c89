"""What comes through links and APIs, which ComfyUI does not check: every number, choice, text and switch."""

import math

import numpy as np
import pytest
import torch
from comfy_api.latest import io
from pack.nodes import extension
from pack.nodes.inputs.checked import CheckedNode, File

NODES = [*extension.METHOD_NODES, *extension.THEATRE_NODES]
WRONG = {
    File: [None, 3, ["a"]],
    io.Int.Input: [math.nan, math.inf, 1.5, "7", True, None, torch.ones(1)],
    io.Float.Input: [math.nan, math.inf, -math.inf, "0.5", True, None, torch.ones(1)],
    io.Combo.Input: ["no such choice", None, 0],
    io.String.Input: [None, 3, b"text"],
    io.Boolean.Input: ["false", 1, None],
}
WIDGETS = [
    pytest.param(node, widget, id=f"{node.__name__}-{widget.id}")
    for node in NODES
    for widget in node.define_schema().inputs
    if isinstance(widget, tuple(WRONG))
]


def wrong_values(widget):
    values = list(next(values for kind, values in WRONG.items() if isinstance(widget, kind)))
    if isinstance(widget, io.Int.Input | io.Float.Input):
        values += [limit for limit in (widget.min - 1, widget.max + 1)]
    return [value for value in values if not (widget.optional and value is None)]


@pytest.mark.parametrize(("node", "widget"), WIDGETS)
def test_no_node_takes_a_value_that_its_schema_does_not_allow(node, widget):
    schema = node.define_schema()
    others = {other.id: getattr(other, "default", None) for other in schema.inputs if isinstance(other, tuple(WRONG))}
    others = {name: value for name, value in others.items() if value is not None}
    for value in wrong_values(widget):
        values_by_name = {**others, widget.id: value}
        if schema.is_input_list:
            values_by_name = {name: [each] for name, each in values_by_name.items()}
        with pytest.raises(ValueError, match=f"^{widget.id} is .*: (use|choose|connect) "):
            node.execute(**values_by_name)


def test_every_node_checks():
    assert all(issubclass(node, CheckedNode) for node in NODES)


class Node(CheckedNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Node", inputs=[
            io.Int.Input("seed", min=0, max=9), io.Float.Input("strength", default=0.5, min=0, max=1, optional=True),
        ])

    @classmethod
    def execute(cls, seed, strength=0.25, **others):
        return seed, strength, others


@pytest.mark.parametrize("seed", [3, 3.0, np.int64(3), np.float64(3)])
def test_whole_numbers_of_any_type_are_taken(seed):
    for value, _, _ in (Node.execute(seed), Node.execute(seed=seed)):
        assert value == 3 and type(value) is int


def test_what_is_not_connected_has_the_nodes_own_default_and_other_types_are_left_alone():
    assert Node.execute(0, None, picture=None) == (0, 0.25, {"picture": None})


def test_a_limit_is_allowed_and_the_error_says_both():
    assert Node.execute(9, 1.0)[:2] == (9, 1.0)
    with pytest.raises(ValueError, match=r"^seed is -1: use 0 to 9$"):
        Node.execute(-1)


def test_comfyui_copies_of_a_node_check_once():
    copy = type("Copy", (Node, CheckedNode), dict(Node.__dict__))
    assert copy.execute.__func__ is Node.execute.__func__
