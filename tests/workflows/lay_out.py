"""Lays out the workflows for the sizes that their nodes have after a run, which it measures in the real frontend.

    python tests/workflows/lay_out.py               # all of them
    python tests/workflows/lay_out.py NAME ...      # these alone; real ones need a run of every theatre workflow
    python tests/workflows/lay_out.py --measured    # with the sizes of the last start, without a browser

Needs a Chromium, as the browser test does. Nodes never get smaller: to make one smaller, change its size in the file
first. Only positions, sizes and groups are written.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows")]
from launcher import environment, source, workflow_files  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)

from launcher.server import Server  # noqa: E402
from support import frontend, graph_layout  # noqa: E402

MEASURED = ROOT / ".cache" / "browser" / "after_run.json"


def is_theatre(workflow: workflow_files.Workflow) -> bool:
    return workflow.stem.startswith("Puppets")


def measured(screen: frontend.Frontend, workflow: workflow_files.Workflow) -> dict:
    """`sizes` of nodes after a run, the greater of both renderers, with title bars; `titles` of the groups."""
    screen.open(workflow.content, shrunk=True)
    if is_theatre(workflow):
        screen.run()
    else:
        screen.pretend()
    titles = screen.groups()[1]
    classic, modern = screen.rectangles()
    sizes = {number: [max(box[i], modern[number][i]) for i in (2, 3)] for number, box in classic.items()}
    return {"sizes": sizes, "titles": titles}


def measure(workflows: list[workflow_files.Workflow], comfyui: Path) -> None:
    """Write the sizes of these workflows' nodes to the cache."""
    found = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(comfyui, Path(folder), cpu=True) as server,
        frontend.opened(server) as screen,
    ):
        for workflow in workflows:
            found[workflow.stem] = measured(screen, workflow)
            MEASURED.write_text(json.dumps(found), encoding="utf-8")
            print("measured", workflow.stem, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows to lay out (default: all)")
    parser.add_argument("--measured", action="store_true", help="use the sizes of the last start")
    options = parser.parse_args()
    chosen = workflow_files.find(ROOT / "workflows", options.names)
    if not options.measured:
        every = workflow_files.find(ROOT / "workflows", [])
        runs = chosen if all(map(is_theatre, chosen)) else [one for one in every if is_theatre(one)]
        measure([*runs, *(one for one in chosen if not is_theatre(one))], source.obtain(ROOT))
    sizes = json.loads(MEASURED.read_text(encoding="utf-8"))
    for workflow in chosen:
        content = graph_layout.arranged(workflow.content, **sizes[workflow.stem])
        workflow.path.write_text(workflow_files.text(content), encoding="utf-8")
        print("laid out", workflow.stem)


if __name__ == "__main__":
    main()
