"""Templates for real models: their links are those of ComfyUI's template library, and they run from end to end.

The library is the package that ComfyUI's own requirements pin. The runs use small files of ComfyUI's classes with
random weights under the same names, through ComfyUI's own loaders (support/small_models.py): they test wiring and
shapes, not pictures. `tests/nodes/test_real_configurations.py` looks at the real shapes.
"""

import json
import re
from importlib import resources

import pytest
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from launcher import scripts, workflow_files
from launcher.server import Server
from support import small_models, tiny_model

FILES = sorted((scripts.ROOT / "workflows").glob("Real-*.json"))
# SDPose and the encoders of the appearance have no small form here.
NOT_RUN = {"Real-1-People-in-poses-SD21"}
# Published for these methods, or withdrawn by their publisher: not in ComfyUI's library.
ELSEWHERE = {
    "Stand-In_wan2.1_T2V_14B_ver1.0_fp16.safetensors", "Stand-In_wan2.2_T2V_A14B_high.ckpt",
    "Stand-In_wan2.2_T2V_A14B_low.ckpt", "clip-vit-large-patch14.safetensors", "dinov2-large.safetensors",
    "v2-1_512-ema-pruned.safetensors", "v2-1_768-ema-pruned.safetensors",
}
# By input: sizes, lengths and steps that the small models do in seconds. Six windows stay six.
SMALL = {
    "width": 64, "height": 64, "size": 64, "length": {341: 49}, "context_length": 9, "context_overlap": 4,
    "steps": 2, "context_steps": 1, "start_at_step": {10: 1}, "end_at_step": {10: 1}, "class_count": 1,
    "batch_size": 1, "rank": 2, "tile_size": 64, "overlap": 32, "x": {576: 32},
}
OFF = {"LoadBackgroundRemovalModel", "LossGraphNode"}


@pytest.fixture(scope="module")
def library() -> set[tuple[str, str]]:
    """Names and addresses of all model files in ComfyUI's own templates."""
    found = set()
    folder = resources.files("comfyui_workflow_templates_json") / "templates"
    for file in folder.iterdir():
        content = json.loads(file.read_text(encoding="utf-8")) if file.name.endswith(".json") else {}
        for node in _nodes(content):
            for model in (node.get("properties") or {}).get("models") or []:
                found.add((model["name"], model["url"].partition("?")[0]))
    return found


def _nodes(content):
    if not isinstance(content, dict):
        return []
    graphs = [content, *content.get("definitions", {}).get("subgraphs", [])]
    return [node for graph in graphs for node in graph.get("nodes", [])]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_its_models_are_those_of_comfyui_s_own_templates(path, library):
    models = workflow_files.Workflow(path).models()
    assert models and len(library) > 100
    assert [model for model in models if (model["name"], model["url"]) not in library
            and model["name"] not in ELSEWHERE] == []


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_its_note_says_that_nobody_has_run_it(path):
    (note,) = (node["widgets_values"][0] for node in workflow_files.Workflow(path).nodes()
               if node["type"] == "MarkdownNote" and node.get("title") == "Read me")
    assert re.search(r"real weights yet|not (?:been )?measured|nobody has measured", note)


def windows(settings, length):
    """The latent frames of each of ComfyUI's context windows over a video of `length` frames."""
    patched = WanContextWindowsManualNode.execute(tiny_model.wan(), **settings).result[0]
    handler = patched.model_options["context_handler"]
    frames = torch.zeros(1, 16, (length - 1) // 4 + 1, 1, 1)
    return [window.index_list for window in handler.get_context_windows(patched.model, frames, {})]


@pytest.mark.parametrize("stem", ["Real-5c-Long-take-Wan21", "Puppets-5c-Long-take"])
def test_a_long_take_has_six_windows_that_share_what_its_note_says(stem):
    workflow = workflow_files.Workflow(scripts.ROOT / "workflows" / f"{stem}.json")
    by_type = {node["type"]: node["widgets_values"] for node in workflow.nodes()}
    names = [widget.id for widget in WanContextWindowsManualNode.define_schema().inputs if widget.id != "model"]
    settings = dict(zip(names, by_type["WanContextWindowsManual"], strict=True))
    length = by_type["EmptyHunyuanLatentVideo"][2]
    found = windows(settings, length)
    shared = {len(set(first) & set(second)) for first, second in zip(found, found[1:], strict=False)}
    assert len(found) == 6 and len(shared) == 1, "the last one is not moved back to fit"
    (overlap,) = shared
    added = 4 * (len(found[0]) - overlap)
    note = next(node["widgets_values"][0] for node in workflow.nodes() if node.get("title") == "Read me")
    assert {f"{4 * overlap}", f"{added}", f"{length}", f"{length - added}"} <= set(re.findall(r"\d+", note))
    assert len(windows(settings, length + added)) == 7


def test_people_in_poses_are_drawn_as_the_authors_drew_them():
    """Their v-prediction SD 2.1, and the even steps of DDIM: on others the published weights draw other pictures."""
    (path,) = (path for path in FILES if path.stem == "Real-1-People-in-poses-SD21")
    nodes = {node["id"]: node for node in workflow_files.Workflow(path).nodes()}
    origins = {link[0]: link[1] for link in workflow_files.Workflow(path).content["links"]}
    (sampler,) = (node for node in nodes.values() if node["type"] == "KSampler")
    assert sampler["widgets_values"][5] == "ddim_uniform"
    (patched,) = (origins[slot["link"]] for slot in sampler["inputs"] if slot["name"] == "model")
    (loader,) = (origins[slot["link"]] for slot in nodes[patched]["inputs"] if slot["name"] == "model")
    assert nodes[loader]["widgets_values"] == ["v2-1_768-ema-pruned.safetensors"]


@pytest.fixture(scope="module")
def small_server(tmp_path_factory, comfy_path):
    base, models = (tmp_path_factory.mktemp(name) for name in ("server", "models"))
    wanted = [model for path in FILES for model in workflow_files.Workflow(path).models()]
    small_models.write(models, [model for model in wanted if model["name"] in small_models.FILES])
    (base / "custom_nodes").mkdir()
    pack = base / "custom_nodes" / "small_models.py"
    pack.write_text(small_models.PACK.format(folder=str(scripts.ROOT / "tests")), encoding="utf-8")
    with Server(comfy_path, base, models=models, cpu=True, options=(pack.name,)) as running:
        yield running


def shrunk(workflow, object_info):
    """The workflow as a prompt with all groups on and small sizes; masks of ones in place of BiRefNet's and SAM's."""
    for node in workflow["nodes"]:
        node["mode"] = 0
    prompt = convert_ui_to_api(workflow, object_info)
    for number in [number for number, node in prompt.items() if node["class_type"] in OFF]:
        del prompt[number]
    for node in prompt.values():
        if node["class_type"] in ("RemoveBackground", "SAM3_Detect"):
            node.update(class_type="SolidMask", inputs={"value": 1.0, "width": 64, "height": 64})
        if node["class_type"] == "FluxKontextImageScale":
            size = {"width": 64, "height": 64, "upscale_method": "area", "crop": "center"}
            node.update(class_type="ImageScale", inputs={**node["inputs"], **size})
        for name, value in node["inputs"].items():
            if name in SMALL and isinstance(value, int):
                small = SMALL[name]
                node["inputs"][name] = small.get(value, value) if isinstance(small, dict) else min(small, value)
            if name == "length" and value == 81:
                node["inputs"][name] = 9
    return prompt


def without(prompt, class_types):
    """The prompt without these output nodes."""
    return {number: node for number, node in prompt.items() if node["class_type"] not in class_types}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in NOT_RUN], ids=lambda path: path.stem)
def test_it_runs_with_small_random_weights(path, small_server):
    workflow = workflow_files.Workflow(path).content
    prompt = shrunk(workflow, small_server.object_info())
    for node in prompt.values():
        if node["class_type"] == "WanContextWindowsManual":
            settings = {name: value for name, value in node["inputs"].items() if name != "model"}
            assert len(windows(settings, 49)) == 6
    hooked = [number for number, node in prompt.items() if node["class_type"] == "CreateHookLoraModelOnly"]
    if hooked:  # its second run reads what the first one saved
        first = without(prompt, {"SaveImage", "PreviewImage"})
        check(small_server.queue(first), first)
        prompt = without(shrunk(workflow, small_server.object_info()), {"UnderstudySaveIdentityPrior"})
    outputs = check(small_server.queue(prompt), prompt)
    kinds = {prompt[number]["class_type"] for number, shown in outputs.items() if shown}
    assert kinds & {"SaveImage", "SaveVideo"}


def check(entry, prompt):
    """The outputs of a run that succeeded."""
    errors = [message for message in entry["status"]["messages"] if message[0] == "execution_error"]
    assert entry["status"]["status_str"] == "success", [
        (error["node_type"], prompt[error["node_id"]]["inputs"], error["exception_message"]) for _, error in errors
    ]
    return entry["outputs"]
