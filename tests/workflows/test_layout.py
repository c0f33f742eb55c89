"""Every workflow after a run, in the real frontend: no node covers another, and groups hold theirs.

`python tests/workflows/lay_out.py` lays out the ones that fail.
"""

import functools
import json

import pytest
from launcher import scripts
from support import frontend, graph_layout

FILES = sorted((scripts.ROOT / "workflows").glob("*.json"))
THEATRE = [path for path in FILES if path.stem.startswith("Puppets")]


@pytest.fixture(scope="module")
def screen(server):
    with frontend.opened(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def after_run(screen):
    """The faults of a workflow's layout after a run, in both renderers; each workflow is run once."""

    @functools.cache
    def found(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path in THEATRE:
            screen.open(content)
            screen.run()
        else:  # it cannot run here, and shows what nodes of the same type showed in the theatre
            for other in THEATRE:
                found(other)
            screen.open(content)
            screen.pretend()
        return faults(screen, content)

    return found


def faults(screen, content):
    groups, titles = screen.groups()
    names = {str(node["id"]): f"{node['id']} {node.get('title') or node['type']}" for node in content["nodes"]}
    return [
        graph_layout.faults({names[number]: box for number, box in boxes.items()}, groups, titles)
        for boxes in screen.rectangles()
    ]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_after_a_run_nothing_overlaps_and_groups_hold_their_nodes(path, after_run):
    assert after_run(path) == [[], []]


def test_a_node_that_grows_over_the_next_one_and_out_of_its_group_would_be_seen(screen):
    """Save Image as high as with a picture: 40 units below it is the next node, 10 the end of the group."""
    content = json.loads(THEATRE[0].read_text(encoding="utf-8"))
    kinds = ("SaveImage", "VAEDecode")
    saver, other = [next(node for node in content["nodes"] if node["type"] == kind) for kind in kinds]
    saver.update(id=1, pos=[0, 0], size=[400, 60], title="saver", inputs=[])
    other.update(id=2, pos=[0, 130], size=[400, 60], title="other", inputs=[], outputs=[])
    group = {"id": 1, "title": "The group", "bounding": [-20, -80, 440, 150], "color": "#3f789e", "flags": {}}
    content.update(nodes=[saver, other], links=[], groups=[group])
    screen.open(content)
    assert faults(screen, content)[0] == []
    screen.page.evaluate("() => app.graph.getNodeById(1).setSize([400, 300])")
    expected = ["1 saver and 2 other overlap", "1 saver is half outside the group The group"]
    assert faults(screen, content) == [expected, expected]
