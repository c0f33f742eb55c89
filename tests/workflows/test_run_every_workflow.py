"""Every workflow of the pack: well formed, made of core nodes and ours, and run to its pictures."""

import io
import json

import numpy as np
import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from launcher import execution, scripts, workflow_files
from launcher.server import PACK_NAME
from PIL import Image

FILES = sorted((scripts.ROOT / "workflows").glob("*.json"))
UI_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
NUMBERS = {"INT": int, "FLOAT": (int, float)}

pytestmark = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()


def inputs_of(schema):
    """{input name: (type or list of options, settings)} of a node as the server describes it."""
    inputs = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in inputs.items()}


def test_links_lead_from_slot_to_slot(path):
    content = workflow_files.Workflow(path).content
    nodes = {node["id"]: node for node in content["nodes"]}
    assert len(nodes) == len(content["nodes"]), "node ids are unique"
    assert len({link[0] for link in content["links"]}) == len(content["links"]), "link ids are unique"
    for link, origin, origin_slot, target, target_slot, _type in content["links"]:
        assert link in nodes[origin]["outputs"][origin_slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == link
    used = {slot["link"] for node in nodes.values() for slot in node.get("inputs", []) if slot.get("link")}
    assert used == {link[0] for link in content["links"]}


def test_nodes_are_core_nodes_and_ours(path, object_info):
    workflow = workflow_files.Workflow(path)
    types = {node["type"] for node in workflow.nodes()} - UI_ONLY - workflow.subgraph_ids()
    assert types <= object_info.keys()
    for node_type in types:
        module = object_info[node_type]["python_module"]
        assert (
            module == "nodes"
            or module.split(".")[0] == "comfy_extras"
            or module == f"custom_nodes.{PACK_NAME}"
        )


def test_widget_values_suit_their_inputs(path, object_info):
    prompt = convert_ui_to_api(json.loads(path.read_text(encoding="utf-8")), object_info)
    for node_id, node in prompt.items():
        schema = object_info[node["class_type"]]
        known = inputs_of(schema)
        where = f"node {node_id} ({node['class_type']})"
        # "group.field" and "images.0" are fields of inputs that grow.
        assert {name.split(".")[0] for name in node["inputs"]} <= known.keys(), where
        assert schema["input"].get("required", {}).keys() <= {
            name.split(".")[0] for name in node["inputs"]
        }, where
        for name, value in node["inputs"].items():
            kind, settings = known.get(name, ("", {}))
            if isinstance(value, list):
                continue
            if isinstance(kind, str) and kind in NUMBERS:
                assert isinstance(value, NUMBERS[kind]) and not isinstance(value, bool), (where, name, value)
                assert settings.get("min", value) <= value <= settings.get("max", value), (where, name, value)
            elif kind in ("STRING", "BOOLEAN"):
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), (where, name, value)
            options = (
                kind if isinstance(kind, list) else settings.get("options", []) if kind == "COMBO" else []
            )
            models = {model["name"] for model in workflow_files.Workflow(path).models()}
            assert not options or value in options or value in models, (where, name, value)


def test_it_describes_itself(path):
    description = workflow_files.Workflow(path).description
    assert len(description) > 40, "a note begins with `# Title` and a paragraph that says what it shows"


def test_its_template_has_a_picture(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert max(picture.size) >= 256
        assert np.asarray(picture.convert("L")).std() > 5


def test_it_runs_and_shows_something(path, server):
    workflow = workflow_files.Workflow(path)
    missing = [model["name"] for model in server.missing(workflow.models())]
    if missing:
        pytest.skip("needs " + ", ".join(missing))
    result = execution.run(server, path)
    assert result.error is None
    pictures = [file for file in result.files if file["filename"].endswith(".png")]
    assert [file for file in pictures if file["type"] == "output"], "something is saved"
    for file in pictures:
        content = server.view(file["filename"], file["subfolder"], file["type"])
        assert np.asarray(Image.open(io.BytesIO(content)).convert("L")).std() > 5, f"{file['title']} is blank"
