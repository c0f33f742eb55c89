"""The pack's blueprints, `subgraphs/*.json`: ComfyUI lists them as this pack's, and its frontend opens them."""

import json

import pytest
from launcher import scripts
from launcher.server import PACK_NAME
from support import frontend

FILES = sorted((scripts.ROOT / "subgraphs").glob("*.json"))
METHODS = {
    "Put someone into a pose": "UnderstudyApplyFusion",
    "Copy an action from a picture": "UnderstudyFrequencyGuidanceSampler",
    "Edit a known subject": "UnderstudyIdentityMaskBlend",
    "Use an action as a word": "UnderstudyApplyActionIdentifier",
    "Keep someone in a video": "UnderstudyApplyVideoIdentity",
}
OPENED = """() => app.graph.nodes.map(node => ({
    title: node.title, widgets: node.widgets.map(widget => [widget.name, widget.value]),
    missing: node.subgraph.nodes.filter(inner => !(inner.type in LiteGraph.registered_node_types)).length,
    inputs: node.inputs.map(slot => slot.name), outputs: node.outputs.map(slot => slot.name)}))"""


def content(path):
    return json.loads(path.read_text(encoding="utf-8"))


def subgraph(path):
    (graph,) = content(path)["definitions"]["subgraphs"]
    return graph


def test_there_is_one_for_each_method():
    assert {path.stem for path in FILES} == set(METHODS)
    for path in FILES:
        assert METHODS[path.stem] in {node["type"] for node in subgraph(path)["nodes"]}


def test_comfyui_lists_them_and_serves_them(server):
    listed = {
        entry["name"]: number for number, entry in server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"
    }
    assert set(listed) == set(METHODS)
    for path in FILES:
        assert json.loads(server.get(f"/global_subgraphs/{listed[path.stem]}")["data"]) == content(path)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_is_one_node_whose_links_lead_from_slot_to_slot(path, server):
    graph = subgraph(path)
    info = {inner["type"]: server.node_info(inner["type"]) for inner in graph["nodes"]}
    (node,) = content(path)["nodes"]
    assert node["type"] == graph["id"] and node["title"] == graph["name"] == path.stem
    assert len(graph["description"]) > 40
    nodes = {inner["id"]: inner for inner in graph["nodes"]}
    for link in graph["links"]:
        number, slots = link["id"], (link["origin_slot"], link["target_slot"])
        outer, inner = (graph["inputs"], "linkIds"), (graph["outputs"], "linkIds")
        if link["origin_id"] == -10:
            assert number in outer[0][slots[0]][outer[1]] and outer[0][slots[0]]["type"] == link["type"]
        else:
            assert number in nodes[link["origin_id"]]["outputs"][slots[0]]["links"]
        if link["target_id"] == -20:
            assert number in inner[0][slots[1]][inner[1]]
        else:
            assert nodes[link["target_id"]]["inputs"][slots[1]]["link"] == number
    for inner in graph["nodes"]:
        schema = info[inner["type"]]["input"]
        known = {**schema.get("required", {}), **schema.get("optional", {})}
        assert {slot["name"].split(".")[0] for slot in inner["inputs"]} <= known.keys()
        assert not info[inner["type"]].get("deprecated")
    assert [(slot["name"], slot["type"]) for slot in node["inputs"]] == [
        (slot["name"], slot["type"]) for slot in graph["inputs"]
    ]


@pytest.fixture(scope="module")
def screen(server):
    with frontend.opened(server) as opened:
        yield opened


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_frontend_opens_it_with_its_values_on_the_outside(path, screen):
    graph = subgraph(path)
    screen.open(content(path))
    (node,) = screen.page.evaluate(OPENED)
    assert node["title"] == path.stem and node["missing"] == 0
    assert node["inputs"] == [slot["name"] for slot in graph["inputs"]]
    assert node["outputs"] == [slot["name"] for slot in graph["outputs"]]
    inside = {str(inner["id"]): inner for inner in graph["nodes"]}
    promoted = content(path)["nodes"][0]["properties"]["proxyWidgets"]
    values = [value for _, value in node["widgets"]]
    assert promoted and len(values) == len(promoted)
    for value, (number, _) in zip(values, promoted, strict=True):
        assert value in inside[number]["widgets_values"]
    prompt = screen.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert sorted(inner["class_type"] for inner in prompt.values()) == sorted(
        inner["type"] for inner in graph["nodes"]
    )
