"""What the layout of a workflow's nodes and groups counts as a fault, and what it makes of one."""

import json

import pytest
from launcher import scripts
from support import graph_layout

FILES = sorted((scripts.ROOT / "workflows").glob("*.json"))
BOX = (0, 0, 100, 100)


@pytest.mark.parametrize(("nodes", "groups", "expected"), [
    ({"a": BOX, "b": (100, 0, 10, 10)}, {}, []),  # side by side
    ({"a": BOX, "b": (99, 99, 10, 10)}, {}, ["a and b overlap"]),
    ({"a": BOX}, {"g": (0, 0, 100, 100)}, []),
    ({"a": BOX}, {"g": (0, 0, 100, 99)}, ["a is half outside the group g"]),
    ({"a": BOX}, {"g": (100, 0, 100, 100)}, []),
    ({"a": BOX}, {"g": (-100, 0, 101, 100)}, ["a is half outside the group g"]),
    ({}, {"g": BOX, "h": (102, 0, 100, 9)}, []),
    ({}, {"g": BOX, "h": (100, 0, 100, 9)}, ["the groups g and h touch"]),
    ({}, {"g": (0, 0, 79, 100)}, ["the title of the group g is wider than it"]),
])
def test_faults(nodes, groups, expected):
    assert graph_layout.faults(nodes, groups, dict.fromkeys(groups, 80)) == expected


def rectangles(content, sizes):
    nodes = {}
    for node in content["nodes"]:
        left, top, *_ = graph_layout.saved_rectangle(node)
        nodes[str(node["id"])] = (left, top, *sizes[str(node["id"])])
    return nodes, {group["title"]: group["bounding"] for group in content["groups"]}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_nodes_that_grow_find_room_and_stay_in_their_group(path):
    """Every node a third higher and 25 units wider than it was saved, and titles of groups that need much room."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    boxes = {str(node["id"]): graph_layout.saved_rectangle(node) for node in saved["nodes"]}
    sizes = {number: (width + 25, height * 4 / 3) for number, (_, _, width, height) in boxes.items()}
    titles = {group["title"]: 600.0 for group in saved["groups"]}
    content = graph_layout.arranged(saved, sizes, titles)
    assert graph_layout.faults(*rectangles(content, sizes), titles) == []
    assert graph_layout.arranged(content, sizes, titles) == content, "a second time changes nothing"
    for before, after in zip(saved["nodes"], content["nodes"], strict=True):
        assert {**after, "pos": 0, "size": 0} == {**before, "pos": 0, "size": 0}, "only places and sizes change"
    assert content["links"] == saved["links"]
    before, after = [[inside(state, node) for node in state["nodes"]] for state in (saved, content)]
    assert before == after


def inside(content, node):
    left, top, width, height = graph_layout.saved_rectangle(node)
    x, y = left + width / 2, top + height / 2
    boxes = {group["title"]: group["bounding"] for group in content["groups"]}
    return [name for name, (a, b, c, d) in boxes.items() if a <= x <= a + c and b <= y <= b + d]


def test_columns_and_rows_are_kept():
    """Two columns in a group; the left upper node grows, and pushes down what is below it alone."""
    def node(number, left, top):
        return {"id": number, "pos": [left, top], "size": [100, 70], "flags": {}}

    nodes = [node(1, 20, 80), node(2, 20, 210), node(3, 160, 80), node(4, 160, 210)]
    content = {"nodes": nodes, "groups": [{"title": "g", "bounding": [0, 0, 280, 300]}]}
    sizes = {"1": (100, 300), "2": (100, 100), "3": (100, 100), "4": (100, 100)}
    laid_out = graph_layout.arranged(content, sizes, {"g": 50})
    assert [node["pos"] for node in laid_out["nodes"]] == [[20, 80], [20, 410], [160, 80], [160, 210]]
    assert [node["size"] for node in laid_out["nodes"]] == [[100, 270], [100, 70], [100, 70], [100, 70]]
    assert laid_out["groups"][0]["bounding"] == [0, 0, 280, 50 + 300 + 30 + 100 + 20]
