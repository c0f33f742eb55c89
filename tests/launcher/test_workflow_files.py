"""What workflow files say about themselves, and how they are found by name."""

import json
import re

import pytest
from launcher import several_choices, source, workflow_files

MODEL = {"name": "sd.safetensors", "url": "https://example.org/sd.safetensors", "directory": "checkpoints"}


def write(path, nodes, **content):
    path.write_text(json.dumps({"nodes": nodes, "links": [], **content}))
    return workflow_files.Workflow(path)


def test_title_and_description_come_from_the_first_note_with_a_heading(tmp_path):
    plain = {"type": "Note", "widgets_values": ["no heading"]}
    note = {
        "type": "MarkdownNote",
        "widgets_values": ["# The title\n\nFirst *paragraph*,\ngoes on.\n\nSecond."],
    }
    workflow = write(tmp_path / "a_b.json", [plain, note])
    assert (workflow.title, workflow.description) == ("The title", "First *paragraph*,\ngoes on.")
    assert write(tmp_path / "c_d.json", [plain]).title == "C d"


def test_a_workflow_is_written_one_node_a_line():
    nodes, groups = [{"id": 1, "title": "顔"}, {"id": 2}], [{"id": 3}]
    content = {"nodes": nodes, "links": [], "groups": groups, "extra": {"a": [1]}}
    text = workflow_files.text(content)
    assert json.loads(text) == content and list(json.loads(text)) == list(content)
    assert text.splitlines()[1:5] == [' "nodes": [', '  {"id": 1, "title": "顔"},', '  {"id": 2}', " ],"]
    assert text.endswith("}\n") and len(text.splitlines()) == 11


def test_models_are_found_inside_subgraphs_and_named_once(tmp_path):
    loader = {"type": "CheckpointLoaderSimple", "properties": {"models": [MODEL]}}
    subgraph = {"id": "5e3a0f4e-0000-4000-8000-000000000000", "nodes": [loader]}
    workflow = write(tmp_path / "a.json", [loader, {"type": "Note"}], definitions={"subgraphs": [subgraph]})
    assert workflow.models() == [MODEL]
    assert workflow.subgraph_ids() == {subgraph["id"]}


def test_pictures_that_workflows_load_come_with_comfyui(pack_root, comfy_path):
    """`run.py` offers ComfyUI's own examples and nothing else."""
    loaded = [
        node["widgets_values"][0]
        for path in (pack_root / "workflows").glob("*.json")
        for node in json.loads(path.read_text())["nodes"]
        if node["type"] in ("LoadImage", "LoadImageMask")
    ]
    offered = {path.name for path in (comfy_path / "input").glob("example.*")}
    assert loaded and set(loaded) <= offered


def test_workflows_are_found_by_stem_file_name_and_path(tmp_path):
    for stem in ("one", "two"):
        write(tmp_path / f"{stem}.json", [])
    other = write(tmp_path.parent / "elsewhere.json", [])
    names = ["two", "one.json", str(other.path), "workflows/two.json"]
    assert [workflow.stem for workflow in workflow_files.find(tmp_path, names)] == ["two", "one", "elsewhere", "two"]
    assert [workflow.stem for workflow in workflow_files.find(tmp_path, [])] == ["one", "two"]
    with pytest.raises(source.SetupError, match="no workflow 'three'. Those of the pack: one, two"):
        workflow_files.find(tmp_path, ["three"])


@pytest.mark.parametrize(("name", "stem"), [
    ("puppets-1a", "Puppets-1a-Pose"), ("PUPPETS_2", "Puppets-2-Action"),
    ("Puppets 2 action.json", "Puppets-2-Action"),
    ("Puppets-2-Action", "Puppets-2-Action"), ("real", "Real"),
])
def test_the_unambiguous_beginning_of_a_name_is_enough(tmp_path, name, stem):
    for known in ("Puppets-1a-Pose", "Puppets-1b-Poses", "Puppets-2-Action", "Real", "Real-1-Pose"):
        write(tmp_path / f"{known}.json", [])
    assert [workflow.stem for workflow in workflow_files.find(tmp_path, [name])] == [stem]


@pytest.mark.parametrize("name", ["puppets", "Puppets-1", ""])
def test_the_beginning_of_several_names_is_refused_and_they_are_listed(tmp_path, name):
    for known in ("Puppets-1a-Pose", "Puppets-1b-Poses"):
        write(tmp_path / f"{known}.json", [])
    with pytest.raises(source.SetupError, match="several names. Use one of them: Puppets-1a-Pose, Puppets-1b-Poses"):
        workflow_files.find(tmp_path, [name])


def test_stems_read_as_titles_and_survive_links_command_lines_and_windows(pack_root):
    """ComfyUI shows the stem as the title, on one line, and opens `?template=` only for these characters."""
    stems = sorted(path.stem for path in (pack_root / "workflows").glob("*.json"))
    assert stems and all(re.fullmatch(r"(Puppets|Real)-[1-9][a-z]?(-[A-Za-z0-9]+)+", stem) for stem in stems)
    assert all(len(stem) <= 38 for stem in stems), "longer ones are cut in the browser"
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        loaders = workflow_files.Workflow(pack_root / "workflows" / f"{stem}.json").models()
        assert stem.startswith("Real" if loaders else "Puppets")
    for word in ("puppet", "pose", "face", "identity", "action", "video", "train"):
        assert any(word in stem.casefold() for stem in stems), word


@pytest.mark.parametrize("text", ["{", "[]", '{"1": {"class_type": "EmptyImage", "inputs": {}}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(source.SetupError, match="bad.json"):
        workflow_files.find(tmp_path, ["bad"])


@pytest.mark.parametrize(("scopes", "codes"), [
    ({"__value__": ["training", "editorial"]}, []), ({"__value__": ["training"]}, []), ("training", []),
    ("sale", ["unknown_enum_value"]), ({"training": True}, ["shape_mismatch"]),
])
def test_several_choices_pass_comfy_cli_and_its_other_checks_stay(scopes, codes):
    """A list reaches it as its own converter wraps it."""
    options = {"options": ["training", "editorial"], "multiselect": True}
    known = {"Record": {"input": {"required": {"scopes": ["COMBO", options]}}, "output": [], "output_node": True}}
    graph = several_choices.engine.Graph.from_object_info(known)
    found = graph.validate_workflow({"1": {"class_type": "Record", "inputs": {"scopes": scopes}}})
    assert [error["code"] for error in found["errors"]] == codes
