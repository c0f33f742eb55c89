"""Where a saved workflow's nodes and groups stand: faults of a layout, and a new layout for given sizes.

A rectangle is `(left, top, width, height)` in the graph's units, a node's title bar included.
"""

from __future__ import annotations

import copy

TITLE = 30  # height of a title bar, which is above a node's `pos`
GROUP_TITLE = 50  # from a group's top to its first node
SIDE, BELOW, BETWEEN_COLUMNS, BETWEEN_ROWS = 20, 20, 40, 30
SLACK = 12  # saved rectangles may overlap by this much and are still two columns or two rows

Rectangle = tuple[float, float, float, float]


def faults(nodes: dict[str, Rectangle], groups: dict[str, Rectangle], titles: dict[str, float]) -> list[str]:
    """Sentences that name nodes that overlap or leave their group, groups that touch, and titles that are cut off.

    `titles` are the widths of the groups' titles.
    """
    found = []
    everything = [("node", name, box) for name, box in nodes.items()]
    everything += [("group", name, box) for name, box in groups.items()]
    for i, (kind, name, box) in enumerate(everything):
        for other_kind, other_name, other in everything[i + 1 :]:
            if kind == other_kind == "node" and _overlap(box, other):
                found.append(f"{name} and {other_name} overlap")
            elif kind == other_kind == "group" and _overlap(_grown(box, 1), other):
                found.append(f"the groups {name} and {other_name} touch")
            elif kind != other_kind and _overlap(box, other) and not _inside(box, other):
                found.append(f"{name} is half outside the group {other_name}")
    wide = (name for name, box in groups.items() if titles[name] > box[2])
    found += [f"the title of the group {name} is wider than it" for name in wide]
    return found


def arranged(content: dict, sizes: dict[str, tuple[float, float]], titles: dict[str, float]) -> dict:
    """The workflow with room for nodes of these sizes (title bars included), by node id.

    Groups and nodes keep their order in columns and rows, read from where they were saved; they never come closer to
    what is above them than they were. Sizes only grow. `titles` are the widths of the groups' titles.
    """
    content = copy.deepcopy(content)
    groups = content.get("groups", [])
    nodes = {node["id"]: node for node in content["nodes"]}
    wanted = {number: _size(node, sizes[str(number)]) for number, node in nodes.items()}
    members: dict[int, list] = {index: [] for index in range(len(groups))}
    outside = []
    for number, node in nodes.items():
        inside = (i for i, group in enumerate(groups) if _holds_centre(group["bounding"], saved_rectangle(node)))
        members.get(next(inside, None), outside).append(number)
    blocks = [(number, saved_rectangle(nodes[number]), wanted[number]) for number in outside]
    within = {}
    for index, group in enumerate(groups):
        inner = [(number, saved_rectangle(nodes[number]), wanted[number]) for number in members[index]]
        (width, height), within[index] = _packed(inner)
        size = (max(width, _up(titles[group["title"]])) + 2 * SIDE, height + GROUP_TITLE + BELOW)
        blocks.append((("group", index), tuple(group["bounding"]), size))
    left, top = min(box[0] for _, box, _ in blocks), min(box[1] for _, box, _ in blocks)
    for name, (x, y) in _packed(blocks)[1].items():
        x, y = x + left, y + top
        if name in nodes:
            _place(nodes[name], x, y, wanted[name])
            continue
        group = groups[name[1]]
        size = next(size for block, _, size in blocks if block == name)
        group["bounding"] = [_whole(x), _whole(y), *map(_whole, size)]
        for number, (inner_x, inner_y) in within[name[1]].items():
            _place(nodes[number], x + SIDE + inner_x, y + GROUP_TITLE + inner_y, wanted[number])
    return content


def saved_rectangle(node: dict) -> Rectangle:
    """A node's rectangle as saved. The size saved for a collapsed one is that of the open node."""
    width, height = (60, 0) if _collapsed(node) else node["size"]
    return node["pos"][0], node["pos"][1] - TITLE, width, height + TITLE


def _packed(items: list, by_column: bool = True) -> tuple[tuple[float, float], dict]:
    """Size and offsets of items `(name, saved rectangle, size)`, in columns of rows of columns and so on."""
    if not items:
        return (0, 0), {}
    if len(items) == 1:
        return items[0][2], {items[0][0]: (0, 0)}
    axis = 0 if by_column else 1
    runs = _runs(items, axis)
    if len(runs) == 1:
        axis = 1 - axis
        runs = _runs(items, axis)
    if len(runs) == 1:  # what overlaps is put below each other
        axis, runs = 1, [[item] for item in sorted(items, key=lambda item: (item[1][1], item[1][0]))]
    end, across, offsets = 0, 0, {}
    start = min(item[1][1] for item in items)
    for index, run in enumerate(runs):
        size, inner = _packed(run, by_column=axis == 1)
        top = min(item[1][1] for item in run) - start
        if axis == 0:
            x, y = end + (BETWEEN_COLUMNS if index else 0), top
            end, across = x + size[0], max(across, y + size[1])
        else:
            x, y = 0, max(top, end + BETWEEN_ROWS) if index else 0
            end, across = y + size[1], max(across, size[0])
        offsets.update({name: (x + a, y + b) for name, (a, b) in inner.items()})
    return ((end, across) if axis == 0 else (across, end)), offsets


def _runs(items: list, axis: int) -> list[list]:
    """The items in groups whose saved extents along the axis do not overlap, in order."""
    runs, reach = [], None
    for item in sorted(items, key=lambda item: item[1][axis]):
        low, length = item[1][axis], item[1][axis + 2]
        if reach is None or low >= reach - SLACK:
            runs.append([])
        runs[-1].append(item)
        reach = max(low + length, reach if reach is not None else low)
    return runs


def _size(node: dict, measured: tuple[float, float]) -> tuple[float, float]:
    if _collapsed(node):
        return _up(measured[0]), TITLE
    return max(node["size"][0], _up(measured[0])), max(node["size"][1] + TITLE, _up(measured[1]))


def _place(node: dict, x: float, y: float, size: tuple[float, float]) -> None:
    node["pos"] = [_whole(x), _whole(y + TITLE)]
    if not _collapsed(node):
        node["size"] = [_whole(size[0]), _whole(size[1] - TITLE)]


def _collapsed(node: dict) -> bool:
    return bool(node.get("flags", {}).get("collapsed"))


def _up(length: float) -> int:
    """The next multiple of ten; what a renderer rounds is no reason for more."""
    return -(-round(length - 0.5) // 10) * 10


def _whole(length: float) -> int | float:
    return int(length) if length == int(length) else length


def _holds_centre(box: Rectangle, inner: Rectangle) -> bool:
    x, y = inner[0] + inner[2] / 2, inner[1] + inner[3] / 2
    return box[0] <= x <= box[0] + box[2] and box[1] <= y <= box[1] + box[3]


def _grown(box: Rectangle, margin: float) -> Rectangle:
    return box[0] - margin, box[1] - margin, box[2] + 2 * margin, box[3] + 2 * margin


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def _inside(one: Rectangle, other: Rectangle) -> bool:
    return all(other[i] <= one[i] and one[i] + one[i + 2] <= other[i] + other[i + 2] for i in (0, 1))
