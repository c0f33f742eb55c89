"""Every help page in ComfyUI's own help panel: nothing is cut off at its right."""

import pytest
from launcher import scripts
from markdown_it import MarkdownIt
from support import frontend

PAGES = sorted((scripts.ROOT / "web" / "docs").rglob("*.md"))
NODE = {"id": 1, "type": "UnderstudyPuppet", "pos": [0, 0], "size": [300, 300], "flags": {}, "order": 0, "mode": 0}
OPEN_HELP = """() => {
    app.canvas.selectNode(app.graph.nodes[0])
    const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s
    stores.get('rightSidePanel').openPanel('info')
}"""
WIDER_THAN_THE_PANEL = """pages => {
    const panel = document.querySelector('.node-help-content .markdown-content')
    return pages.filter(([name, html]) => {
        panel.innerHTML = html
        const all = [panel, ...panel.querySelectorAll('*')]
        const blocks = all.filter(one => getComputedStyle(one).display !== 'inline')
        return blocks.some(one => one.scrollWidth > one.clientWidth + 1)
    }).map(([name]) => name)
}"""


@pytest.fixture(scope="module")
def panel(server):
    """The panel of a node's help, in a window of 1600 pixels."""
    with frontend.opened(server) as screen:
        screen.page.set_viewport_size({"width": 1600, "height": 900})
        screen.open({"last_node_id": 1, "last_link_id": 0, "nodes": [NODE], "links": [], "version": 0.4})
        screen.page.evaluate(OPEN_HELP)
        screen.page.wait_for_selector(".node-help-content .markdown-content h2")
        yield screen.page


def test_no_help_page_is_cut_off_at_the_right(panel):
    markdown = MarkdownIt("js-default")
    names = [str(path.relative_to(scripts.ROOT)) for path in PAGES]
    html = [markdown.render(path.read_text(encoding="utf-8")) for path in PAGES]
    assert panel.evaluate(WIDER_THAN_THE_PANEL, list(zip(names, html, strict=True))) == []


@pytest.mark.parametrize("wide", [
    "```\nLoad Checkpoint ───── model ┐\nLoad Fusion ──── fusion ┴→ MODEL, positive → KSampler\n```",
    "| Input | Default | Effect |\n|---|---|---|\n| `gradient_checkpointing` | false | Computes each block twice |",
])
def test_a_table_or_a_diagram_would_be_cut_off(panel, wide):
    html = MarkdownIt("js-default").render(wide)
    assert panel.evaluate(WIDER_THAN_THE_PANEL, [["wide", html]]) == ["wide"]
