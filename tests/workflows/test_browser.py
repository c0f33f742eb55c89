"""The real frontend in a real browser: every workflow opens as a template, the quickest one runs; labelled files."""

import base64
import io
import json
import re

import numpy as np
import pytest
from launcher import scripts, workflow_files
from launcher.server import PACK_NAME
from PIL import Image
from support import frontend, labels

FILES = sorted((scripts.ROOT / "workflows").glob("*.json"))
QUICKEST = "Puppets-2a-Action-from-a-picture"
SCREENSHOTS = scripts.ROOT / ".cache" / "browser"

# What the frontend does with a template's name in its address.
OPEN_TEMPLATE = """async ([source, stem]) => {
    const answer = await fetch(app.api.apiURL(`/workflow_templates/${source}/${stem}.json`))
    await app.loadGraphData(await answer.json(), true, true, stem, {openSource: 'template'})
}"""
MISSING_NODES = """() => app.graph.nodes
    .filter(node => !(node.type in LiteGraph.registered_node_types) && !node.subgraph)
    .map(node => node.type)"""
WIDGETS = """() => Object.fromEntries(
    app.graph.serialize().nodes.map(node => [node.id, node.widgets_values ?? []]))"""
SHOWN_PICTURES = """() => app.graph.nodes
    .filter(node => node.imgs?.length && node.imgs[0].naturalWidth > 0)
    .map(node => ({type: node.type, src: node.imgs[0].src, width: node.imgs[0].naturalWidth}))"""

# By the page itself: newer frontends show a picture by an address that only it knows.
FILE_OF = """async address => {
    const bytes = new Uint8Array(await (await fetch(address)).arrayBuffer())
    return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''))
}"""


@pytest.fixture(scope="module")
def browser():
    with frontend.browser() as running:
        yield running


def new_page(browser, server):
    """A page for the frontend of the running server, past its greeting for new users."""
    server.post("/settings", {"Comfy.TutorialCompleted": True})
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(120_000)
    return page


@pytest.fixture
def page(browser, server):
    page = new_page(browser, server)
    yield page
    page.close()


def open_template(page, server, stem):
    """Open a workflow as ComfyUI's template browser does, and wait until its last node is there."""
    count = len(workflow_files.Workflow(scripts.ROOT / "workflows" / f"{stem}.json").content["nodes"])
    page.goto(f"{server.url}/?template={stem}&source={PACK_NAME}")
    page.wait_for_function("count => window.app?.graph?.nodes?.length === count", arg=count)


@pytest.fixture(scope="module")
def gallery(browser, server):
    """A page that opens one template after the other, since starting the frontend takes longer than opening one."""
    page = new_page(browser, server)
    open_template(page, server, QUICKEST)
    yield page
    page.close()


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_frontend_opens_it_with_every_node_and_widget(path, gallery):
    assert re.fullmatch(r"[\w.-]+", path.stem, re.ASCII), "the frontend takes no other name from its address"
    gallery.evaluate(OPEN_TEMPLATE, [PACK_NAME, path.stem])
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    gallery.screenshot(path=SCREENSHOTS / f"{path.stem}.png")
    assert gallery.evaluate(MISSING_NODES) == []
    assert gallery.get_by_text("Missing node").count() == 0
    shown = gallery.evaluate(WIDGETS)
    for node in workflow_files.Workflow(path).content["nodes"]:
        saved, values = node.get("widgets_values") or [], shown.pop(str(node["id"]))
        # A newer ComfyUI's own nodes may have more widgets, at the end.
        assert values == saved if node["type"].startswith("Understudy") else values[:len(saved)] == saved
    assert not shown


def test_a_missing_node_would_be_seen(page, server):
    page.goto(server.url)
    page.wait_for_function("() => window.app?.graph?.nodes")
    node = {
        "id": 1,
        "type": "NoSuchNode",
        "pos": [0, 0],
        "size": [200, 100],
        "flags": {},
        "order": 0,
        "mode": 0,
    }
    graph = {"last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4}
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.get_by_text("Missing node").first.wait_for()
    assert page.evaluate(MISSING_NODES) == ["NoSuchNode"]


SAVED = scripts.ROOT / "tests" / "workflows" / "saved" / "prompt_switch_driving_first.json"
SAVED_AS_TEMPLATE = "Puppets-2a-Action-from-a-picture"
DRIVING_TEXT, TARGET_TEXT, SWITCH = ["7", 0], ["8", 0], "10"  # of the nodes in SAVED


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes 2.0"])
def test_a_prompt_switch_saved_with_driving_first_keeps_its_links(modern, gallery):
    """Sockets of a saved workflow go by name: the order of the inputs was changed after it was saved."""
    gallery.evaluate(frontend.RENDER, modern)
    try:
        gallery.evaluate("graph => app.loadGraphData(graph)", json.loads(SAVED.read_text(encoding="utf-8")))
        gallery.wait_for_function(
            "id => app.graph.getNodeById(Number(id))?.inputs?.[0].name === 'target'", arg=SWITCH
        )
        prompt = gallery.evaluate("async () => (await app.graphToPrompt()).output")
    finally:
        gallery.evaluate(frontend.RENDER, False)
    inputs = prompt[SWITCH]["inputs"]
    assert (inputs["target"], inputs["driving"]) == (TARGET_TEXT, DRIVING_TEXT)


def test_several_scopes_of_consent_are_chosen_and_sent_as_a_list(gallery):
    prompt = gallery.evaluate(
        """async () => {
            const node = LiteGraph.createNode("UnderstudyConsentRecord")
            app.graph.add(node)
            const before = (await app.graphToPrompt()).output[node.id].inputs
            node.widgets.find(widget => widget.name === "scopes").value = ["editorial"]
            return [before, (await app.graphToPrompt()).output[node.id].inputs, node.widgets.map(w => w.name)]
        }"""
    )
    assert [inputs["scopes"] for inputs in prompt[:2]] == [
        {"__value__": []}, {"__value__": ["editorial"]}
    ]
    assert prompt[2] == ["subject", "scopes", "granted_by", "granted_on", "expires", "note"]


def test_words_of_a_sheet_connect_to_lists_and_texts(gallery):
    linked = gallery.evaluate(
        """async () => {
            const [sheet, puppet] = ["UnderstudyCastingSheet", "UnderstudyPuppet"].map(type => {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                return node
            })
            for (const [output, input] of [["identity", "identity"], ["action", "action"], ["scene", "scene"]])
                sheet.connect(sheet.findOutputSlot(output), puppet, puppet.findInputSlot(input))
            const inputs = (await app.graphToPrompt()).output[puppet.id].inputs
            return ["identity", "action", "scene"].map(name => inputs[name][1])
        }"""
    )
    assert linked == [0, 2, 3]


def test_a_bypassed_prompt_switch_keeps_the_target(gallery):
    gallery.evaluate(OPEN_TEMPLATE, [PACK_NAME, SAVED_AS_TEMPLATE])
    prompt = gallery.evaluate(
        "async id => { app.graph.getNodeById(Number(id)).mode = 4; return (await app.graphToPrompt()).output }",
        SWITCH,
    )
    links = [value for node in prompt.values() for value in node["inputs"].values()]
    assert SWITCH not in prompt and TARGET_TEXT in links and DRIVING_TEXT not in links


def test_the_run_button_makes_a_picture(page, server):
    open_template(page, server, QUICKEST)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(f"() => ({SHOWN_PICTURES})().some(picture => picture.type === 'SaveImage')")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{QUICKEST}_run.png")
    results = "SaveImage", "PreviewImage"  # a sampler's own preview is gone as soon as the run has ended
    for shown in (picture for picture in page.evaluate(SHOWN_PICTURES) if picture["type"] in results):
        data = base64.b64decode(page.evaluate(FILE_OF, shown["src"]))
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert picture.shape[1] == shown["width"] and picture.std() > 5, (
            f"{shown['type']} shows a blank picture"
        )


DROPPED_WORKFLOW = {
    "last_node_id": 77, "last_link_id": 0, "links": [], "version": 0.4, "nodes": [{
        "id": 77, "type": "EmptyImage", "pos": [0, 0], "size": [200, 100], "flags": {}, "order": 0, "mode": 0,
        "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}], "properties": {},
        "widgets_values": [64, 48, 1, 0xFF8800],
    }],
}
DROP = """({content, name, type}) => {
    const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, {type}));
    document.querySelector('canvas').dispatchEvent(
        new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
NODES = "() => app.graph.serialize().nodes.map(node => [String(node.id), node.type, node.widgets_values])"


def labelled(server, media):
    """The file that Label Media, or Save Image, made on the server."""
    labels.certify(server.base)
    prompt = {
        "77": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2, "color": 255}},
        "video": {"class_type": "CreateVideo", "inputs": {"images": ["77", 0], "fps": 8}},
        "label": {"class_type": "UnderstudyLabelMedia", "inputs": {
            "filename_prefix": "x", "label": labels.TRAINED, "sign": True,
            **({"video": ["video", 0]} if media == "mp4" else {"images": ["77", 0], "format": media}),
        }},
    }
    body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": DROPPED_WORKFLOW}}}
    entry = server.wait(server.post("/prompt", body)["prompt_id"])
    saved = entry["outputs"]["label"]["images"][0]
    return server.base / "output" / saved["subfolder"] / saved["filename"]


def test_a_labelled_file_that_is_dropped_opens_its_workflow(page, server):
    """All but a JPEG, which the window loads as a picture; help says so."""
    paths = {media: labelled(server, media) for media in ("png", "webp", "mp4", "jpeg")}
    page.goto(server.url)
    page.wait_for_function("() => window.app?.vueAppReady")
    for media, path in paths.items():
        assert labels.manifests(path)[1]["validation_state"] == "Valid"
        page.evaluate("() => app.graph.clear()")
        content = base64.b64encode(path.read_bytes()).decode()
        page.evaluate(DROP, {"content": content, "name": path.name, "type": labels.TYPES[path.suffix[1:]]})
        page.wait_for_function("() => app.graph.nodes.length === 1")
        ((number, kind, values),) = page.evaluate(NODES)
        if media == "jpeg":
            assert kind == "LoadImage"
        else:
            assert (number, kind, values) == ("77", "EmptyImage", DROPPED_WORKFLOW["nodes"][0]["widgets_values"])
