"""Every workflow of the pack: well formed, made of core nodes and ours, and run to its pictures."""

import io
import json
import re
from collections import Counter

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


@pytest.mark.parametrize("all_on", [False, True], ids=["as saved", "all groups on"])
def test_widget_values_suit_their_inputs(all_on, path, object_info):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        node["mode"] = 0 if all_on else node["mode"]
    prompt = convert_ui_to_api(workflow, object_info)
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
            models = {model["name"] for model in workflow_files.Workflow(path).models()} | saved_names(workflow)
            # The screen shows a text as so many choices as it has letters.
            several = value["__value__"] if settings.get("multiselect") else [value]
            assert not options or {*several} <= {*options} | models, (where, name, value)


def saved_names(workflow):
    """The files that the Save nodes of this workflow write first, which a later run may load."""
    saves = (node for node in workflow["nodes"] if node["type"].startswith("UnderstudySave"))
    return {f"{node['widgets_values'][0]}_00001_.safetensors" for node in saves}


def test_it_describes_itself(path):
    description = workflow_files.Workflow(path).description
    assert len(description) > 40, "a note begins with `# Title` and a paragraph that says what it shows"
    if path.stem.startswith("Puppets"):
        assert description.startswith("These small models know puppets only; for people ")
        (other,) = re.findall(r"for people open \*([\w-]+)\*\.", description) or [None]
        assert other is None or path.with_name(f"{other}.json").exists()


def test_its_notes_are_there_in_three_languages_and_without_inline_code(path):
    """Nodes 2.0 shows inline code blue on blue. A note is not translated, so each language has one."""
    notes = {node.get("title"): node["widgets_values"][0]
             for node in workflow_files.Workflow(path).nodes() if node["type"] == "MarkdownNote"}
    assert list(notes) == ["Read me", "日本語", "中文"]
    assert [title for title, text in notes.items() if "`" in text or not text.startswith("# ")] == []
    if path.stem.startswith("Puppets"):
        firsts = (notes[language].split("\n\n")[1] for language in ("日本語", "中文"))
        puppets_only = "この小さなモデルが知っているのは紙人形だけです。", "这些小模型只认识纸偶；要处理真人，请"
        assert all(map(str.startswith, firsts, puppets_only))


def test_nothing_in_it_is_deprecated_and_equal_titles_differ(path, object_info):
    nodes = [node for node in workflow_files.Workflow(path).nodes() if node["type"] not in UI_ONLY]
    assert [node["type"] for node in nodes if object_info[node["type"]].get("deprecated")] == []
    titles = Counter(node.get("title") or object_info[node["type"]]["display_name"] or node["type"] for node in nodes)
    assert [title for title, count in titles.items() if count > 1] == []


def test_the_first_run_of_a_real_model_trains_nothing(path, object_info):
    """ComfyUI bypasses nodes of mode 4; the note says how they are switched on."""
    if path.stem.startswith("Puppets"):
        pytest.skip("the theatre trains in two minutes at most")
    workflow = workflow_files.Workflow(path)
    prompt = convert_ui_to_api(workflow.content, object_info)
    types = {node["class_type"] for node in prompt.values()}
    assert not {name for name in types if name.startswith("UnderstudyTrain")}
    assert any(object_info[name]["output_node"] for name in types), "the first run shows something"
    if any(node["mode"] for node in workflow.nodes()):
        notes = [node["widgets_values"][0] for node in workflow.nodes() if node["type"] == "MarkdownNote"]
        assert all("Set Group Nodes to Always" in text for text in notes)


def test_its_template_has_a_picture(path):
    """Square, at twice the size that the template browser shows."""
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (512, 512)
        assert np.asarray(picture.convert("L")).std() > 5


def trainings(content):
    """The widgets of its nodes that train an identity prior; the fourth is the number of steps."""
    nodes = (node for node in content["nodes"] if node["type"] == "UnderstudyTrainIdentityPrior" and not node["mode"])
    return [node["widgets_values"] for node in nodes]


def without_repetition(path, folder):
    """The workflow, but a training that a later one runs whole, to the letter, ends after its first preview."""
    content = json.loads(path.read_text(encoding="utf-8"))
    later = [json.loads(other.read_text(encoding="utf-8")) for other in FILES[FILES.index(path) + 1:]]
    repeated = [widgets for widgets in trainings(content) if any(widgets in trainings(other) for other in later)]
    for widgets in repeated:
        widgets[3] = 60
    copy = folder / path.name
    copy.write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_it_runs_and_shows_something(path, server, tmp_path):
    workflow = workflow_files.Workflow(path)
    missing = [model["name"] for model in server.missing(workflow.models())]
    if missing:
        pytest.skip("needs " + ", ".join(missing))
    result = execution.run(server, without_repetition(path, tmp_path))
    assert result.error is None
    pictures = [file for file in result.files if file["filename"].endswith(".png")]
    assert [file for file in pictures if file["type"] == "output"], "something is saved"
    for file in pictures:
        content = server.view(file["filename"], file["subfolder"], file["type"])
        picture = Image.open(io.BytesIO(content))
        assert np.asarray(picture.convert("L")).std() > 5, f"{file['title']} is blank"
        assert file["type"] != "output" or picture.width >= 768, f"{file['title']} is too small to be seen"
