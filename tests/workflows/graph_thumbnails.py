"""Writes pictures of the graphs, from the real frontend, for templates whose models are too large to include.

    python tests/workflows/graph_thumbnails.py          # of every workflow that names models for download
    python tests/workflows/graph_thumbnails.py NAME ... # of these alone

Needs a Chromium, as the browser test does. The other templates' pictures are results: workflows/run.py --thumbnails.
"""

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, gallery, source, workflow_files  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)

from launcher.server import PACK_NAME, Server  # noqa: E402
from PIL import Image  # noqa: E402
from support import frontend  # noqa: E402

SIZE = {"width": 3400, "height": 1700}  # of the window: in a smaller one nodes lose their text
MARGIN = 20  # pixels
# Left, top, width and height of the whole graph in the window.
FRAME = """() => {
    const {scale, offset} = app.canvas.ds
    const boxes = [...app.graph.groups, ...app.graph.nodes].map(one => one.boundingRect)
    const low = axis => Math.min(...boxes.map(box => box[axis])) + offset[axis]
    const high = axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])) + offset[axis]
    return [low(0), low(1), high(0) - low(0), high(1) - low(1)].map(length => length * scale)
}"""


def photograph(page, server: Server, workflow: workflow_files.Workflow) -> None:
    """Open a workflow as the template browser does and write its picture beside it."""
    page.goto(f"{server.url}/?template={workflow.stem}&source={PACK_NAME}")
    count = len(workflow.content["nodes"])
    page.wait_for_function("count => window.app?.graph?.nodes?.length === count", arg=count)
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    page.wait_for_timeout(1000)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(3000)  # the view glides there
    left, top, width, height = page.evaluate(FRAME)
    clip = {"x": left - MARGIN, "y": top - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(path=f"{folder}/graph.png", clip=clip)
        with Image.open(f"{folder}/graph.png") as picture:
            padded, how = gallery.padded(picture.convert("RGB")), {"optimize": True, "progressive": True}
            padded.save(workflow.path.with_suffix(".jpg"), quality=85, **how)
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")


def main() -> None:
    workflows = [workflow for workflow in workflow_files.find(ROOT / "workflows", sys.argv[1:]) if workflow.models()]
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        for model in (model for workflow in workflows for model in workflow.models()):
            # Empty, so that the frontend does not mark its loader as one that lacks a file.
            (models / model["directory"]).mkdir(parents=True, exist_ok=True)
            file = models / model["directory"] / model["name"]
            if model["directory"] == "loras":  # its loader lists adapters alone
                shutil.copy(ROOT / "workflows" / "models" / "loras" / "puppets_wan_identity.safetensors", file)
            else:
                file.touch()
        base = Path(folder) / "base"
        with Server(source.obtain(ROOT), base, models=models, cpu=True) as server, frontend.browser() as browser:
            server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
            page = browser.new_page(viewport=SIZE)
            page.set_default_timeout(120_000)
            for workflow in workflows:
                photograph(page, server, workflow)
                print(workflow.path.with_suffix(".jpg").name, flush=True)


if __name__ == "__main__":
    main()
