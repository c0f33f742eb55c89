"""ComfyUI's real frontend in a real browser: opens workflows, runs them, and reads the rectangles of their nodes."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from collections.abc import Iterator

import pytest
from launcher.server import Server
from playwright.sync_api import Browser, TimeoutError, sync_playwright

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
# Sampler previews make nodes grow, so they are on.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Execution.PreviewMethod": "latent2rgb",
    "Comfy.VueNodes.Enabled": False,
}
SHOWS_SOMETHING = ("PreviewImage", "SaveImage")  # shown alike; only one of them may have been run
PATIENCE = 240  # seconds, for a run on a busy machine
# The frontend draws as often as it can, which on a CPU takes its time from the run.
DRAW_SELDOM = "window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), window.pause ?? 200)"
PAUSE = "milliseconds => { window.pause = milliseconds }"
DRAWN = "async times => { while (times--) await new Promise(requestAnimationFrame) }"

# In Nodes 2.0 if true, else in the classic renderer.
RENDER = "modern => app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', modern)"
# Keeps the last message of each kind for each type of node: what a node shows after a run.
LISTEN = """() => {
    window.shown = {}
    const keep = (event, id, detail) => {
        const node = app.graph.getNodeById(Number(id))
        if (node) (window.shown[node.type] ??= {})[event] = detail
    }
    app.api.addEventListener('executed', ({detail}) => keep('executed', detail.display_node ?? detail.node, detail))
    app.api.addEventListener('progress_text', ({detail}) => keep('progress_text', detail.nodeId, detail))
    app.api.addEventListener('b_preview_with_metadata', ({detail}) =>
        keep('b_preview_with_metadata', detail.displayNodeId, detail))
}"""
REPLAY = """alike => {
    const pictured = []
    for (const node of app.graph.nodes) {
        const type = alike.includes(node.type) ? alike.find(name => window.shown[name]) : node.type
        for (const [event, detail] of Object.entries(window.shown[type] ?? {})) {
            const id = String(node.id)
            const names = {node: id, display_node: id, nodeId: id, displayNodeId: id, realNodeId: id}
            app.api.dispatchCustomEvent(event, {...detail, ...names, prompt_id: undefined})
            if (detail.blob || detail.output?.images) pictured.push(id)
        }
    }
    return pictured
}"""
# What a photograph brings in the place of a puppet: two lines on the nodes that tell it, and on samplers for wrapped
# ones. It is not remembered for other workflows.
NOTED = ("UnderstudyApplyVideoIdentity", "UnderstudyPrepareReference")
WRAPPERS = ("UnderstudyFrequencyGuidanceSampler",)
NOTE = """([noted, wrappers]) => {
    const text = 'reference looks like no puppet: for people open a template whose name begins with Real, since '
        + 'these small models know puppets only'
    const kept = window.shown
    window.shown = {}
    for (const node of app.graph.nodes) {
        const before = node.inputs.map((_, slot) => node.getInputNode(slot)?.type)
        if (noted.includes(node.type) || before.some(type => wrappers.includes(type)))
            app.api.dispatchCustomEvent('progress_text', {nodeId: String(node.id), text})
    }
    window.shown = kept
}"""
SHORTEN = """() => {
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (/steps$/.test(widget.name) && widget.value > 2) widget.value = 2
}"""
# What is not in the window is not drawn, and what is not drawn does not grow.
FIT = """() => {
    const boxes = [...app.graph.groups, ...app.graph.nodes].map(one => one.boundingRect)
    const [left, top] = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])))
    const [width, height] = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])))
    app.canvas.ds.fitToBounds([left, top, width - left, height - top], {zoom: 0.8})
    app.canvas.setDirty(true, true)
}"""
SHRINK = """() => {
    for (const node of app.graph.nodes)
        if (!node.flags.collapsed) node.setSize([node.size[0], node.computeSize()[1]])
}"""
PENDING_MEDIA = """ids => ids.filter(id => {
    const node = app.graph.getNodeById(Number(id))  // none for one that a node has added to its run
    return node && !(node.imgs?.length || node.videoContainer || node.widgets?.some(one => /preview/.test(one.name)))
}).concat([...document.querySelectorAll('[data-node-id] img, [data-node-id] video, .dom-widget video')]
    .filter(one => one.tagName === 'IMG' ? !one.complete : one.readyState < 1).map(one => one.src))"""
# A node that shows a video grows with the video, a while after it has loaded.
CLASSIC = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const [left, top, width, height] = node.boundingRect
    const needed = node.flags.collapsed ? 0 : node.computeSize()[1] + LiteGraph.NODE_TITLE_HEIGHT
    return [node.id, [left, top, width, Math.max(height, needed)]]
}))"""
NODES_2 = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    const top = node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT
    return [node.id, element && [node.pos[0], top, element.offsetWidth, element.offsetHeight]]
}))"""
GROUPS = "() => Object.fromEntries(app.graph.groups.map(group => [group.title, [...group.boundingRect]]))"
TITLES = """() => Object.fromEntries(app.graph.groups.map(group => {
    const context = document.createElement('canvas').getContext('2d')
    context.font = `${LiteGraph.GROUP_TEXT_SIZE}px ${LiteGraph.GROUP_FONT}`
    return [group.title, context.measureText(group.title).width + LiteGraph.GROUP_TEXT_SIZE]
}))"""


class Frontend:
    """One page of the frontend, which opens one workflow after the other.

    What a type of node showed in a run is remembered, so that `pretend` can show it in workflows that cannot run.
    """

    def __init__(self, page, server: Server):
        self.page, self.server = page, server
        page.add_init_script(DRAW_SELDOM)
        page.goto(server.url)
        # It opens a workflow of its own when it starts, which must not come after ours.
        page.wait_for_function("() => window.app?.graph?.nodes?.length")
        page.evaluate(LISTEN)

    def open(self, content: dict, shrunk: bool = False) -> None:
        """Open a workflow in the classic renderer; if `shrunk`, its nodes are as low as they can be."""
        self.page.evaluate(RENDER, False)
        self.page.evaluate("content => app.loadGraphData(content)", copy.deepcopy(content))
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(content["nodes"]))
        if shrunk:
            self.page.evaluate(SHRINK)
        self.page.evaluate(FIT)
        self._settle(CLASSIC)

    def run(self) -> None:
        """Run the open workflow with two steps of each sampling and training, then show notes as of a photograph."""
        self.page.evaluate(SHORTEN)
        self.server.free()
        before = set(self.server.get("/history"))
        self.page.evaluate("() => app.queuePrompt(0)")
        deadline = time.monotonic() + PATIENCE
        while not (new := set(self.server.get("/history")) - before):
            assert time.monotonic() < deadline and self.server.alive(), self.server.tail()
            self.page.wait_for_timeout(300)
        entry = self.server.get("/history")[new.pop()]
        assert entry["status"]["status_str"] == "success", entry["status"]
        self._wait_for_media([node for node, output in entry["outputs"].items() if output.get("images")])
        self.page.evaluate(NOTE, [NOTED, WRAPPERS])

    def pretend(self) -> None:
        """Show on every node of the open workflow what its type showed in an earlier run."""
        pictured = self.page.evaluate(REPLAY, list(SHOWS_SOMETHING))
        with contextlib.suppress(TimeoutError):  # a preview that is replayed without its run may stay out
            self._wait_for_media(pictured, timeout=3000)
        self._wait_for_media([])

    def rectangles(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """The nodes' rectangles, title bars included, in the classic renderer and in Nodes 2.0."""
        classic = self._settle(CLASSIC)
        self.page.evaluate(RENDER, True)
        self._wait_for_media([])
        return classic, self._settle(NODES_2)

    def groups(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        """The groups' rectangles, and the widths of their titles."""
        return self.page.evaluate(GROUPS), self.page.evaluate(TITLES)

    def _wait_for_media(self, nodes: list[str], **timeout: int) -> None:
        self.page.wait_for_function(f"ids => !({PENDING_MEDIA})(ids).length", arg=nodes, **timeout)

    def _settle(self, script: str) -> dict[str, list[float]]:
        """The rectangles that the script reads, as soon as they stay the same over two dozen drawings."""
        seen = []
        deadline = time.monotonic() + PATIENCE
        self.page.evaluate(PAUSE, 25)
        self.page.evaluate(DRAWN, 10)  # until the last long pause is over
        while len(seen) < 4 or any(one != seen[-1] or None in one.values() for one in seen[-4:]):
            assert time.monotonic() < deadline, f"the nodes never come to rest: {seen[-2:]}"
            self.page.evaluate(DRAWN, 6)
            seen.append(self.page.evaluate(script))
        self.page.evaluate(PAUSE, 200)
        return seen[-1]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A running browser. Skips the test where there is none, but fails it on a CI."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable and os.environ.get("CI"):
        pytest.fail("No browser: install Debian's package `chromium`.")
    if not executable:
        pytest.skip("no Chromium here; Debian's package is `chromium`")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def opened(server: Server) -> Iterator[Frontend]:
    """The frontend of a running server, past its greeting for new users."""
    server.post("/settings", SETTINGS)
    with browser() as running:
        page = running.new_page(viewport={"width": 1000, "height": 640})
        page.set_default_timeout(PATIENCE * 1000)
        yield Frontend(page, server)
