"""The real frontend in a real browser: every workflow opens as a template, the quickest one runs."""

import io
import json
import os
import shutil
import urllib.request

import numpy as np
import pytest
from launcher import scripts, workflow_files
from launcher.server import PACK_NAME
from PIL import Image
from playwright.sync_api import sync_playwright

FILES = sorted((scripts.ROOT / "workflows").glob("*.json"))
QUICKEST = "Puppets-2a-Action-from-a-picture"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = scripts.ROOT / ".cache" / "browser"

MISSING_NODES = """() => app.graph.nodes
    .filter(node => !(node.type in LiteGraph.registered_node_types) && !node.subgraph)
    .map(node => node.type)"""
WIDGETS = """() => Object.fromEntries(
    app.graph.serialize().nodes.map(node => [node.id, node.widgets_values ?? []]))"""
SHOWN_PICTURES = """() => app.graph.nodes
    .filter(node => node.imgs?.length && node.imgs[0].naturalWidth > 0)
    .map(node => ({type: node.type, src: node.imgs[0].src, width: node.imgs[0].naturalWidth}))"""


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable and os.environ.get("CI"):
        pytest.fail("No browser: install Debian's package `chromium`.")
    if not executable:
        pytest.skip("no Chromium here; Debian's package is `chromium`")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    """The frontend of the running server, past its greeting for new users."""
    server.post("/settings", {"Comfy.TutorialCompleted": True})
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(120_000)
    yield page
    page.close()


def open_template(page, server, stem):
    """Open a workflow as ComfyUI's template browser does, and wait until its last node is there."""
    count = len(workflow_files.Workflow(scripts.ROOT / "workflows" / f"{stem}.json").content["nodes"])
    page.goto(f"{server.url}/?template={stem}&source={PACK_NAME}")
    page.wait_for_function("count => window.app?.graph?.nodes?.length === count", arg=count)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_frontend_opens_it_with_every_node_and_widget(path, page, server):
    open_template(page, server, path.stem)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{path.stem}.png")
    assert page.evaluate(MISSING_NODES) == []
    assert page.get_by_text("Missing node").count() == 0
    saved = {
        str(node["id"]): node.get("widgets_values") or []
        for node in workflow_files.Workflow(path).content["nodes"]
    }
    assert page.evaluate(WIDGETS) == saved


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
def test_a_prompt_switch_saved_with_driving_first_keeps_its_links(modern, page, server):
    """Sockets of a saved workflow go by name: the order of the inputs was changed after it was saved."""
    server.post("/settings", {"Comfy.VueNodes.Enabled": modern})
    try:
        page.goto(server.url)
        page.wait_for_function("() => window.app?.graph?.nodes")
        page.evaluate("graph => app.loadGraphData(graph)", json.loads(SAVED.read_text(encoding="utf-8")))
        page.wait_for_function("id => app.graph.getNodeById(Number(id))?.inputs?.[0].name === 'target'", arg=SWITCH)
        prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    finally:
        server.post("/settings", {"Comfy.VueNodes.Enabled": False})
    inputs = prompt[SWITCH]["inputs"]
    assert (inputs["target"], inputs["driving"]) == (TARGET_TEXT, DRIVING_TEXT)


def test_a_bypassed_prompt_switch_keeps_the_target(page, server):
    open_template(page, server, SAVED_AS_TEMPLATE)
    prompt = page.evaluate(
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
    for shown in page.evaluate(SHOWN_PICTURES):
        with urllib.request.urlopen(shown["src"]) as answer:
            picture = np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))
        assert picture.shape[1] == shown["width"] and picture.std() > 5, (
            f"{shown['type']} shows a blank picture"
        )
