"""Run the pack's workflows in a real ComfyUI and make a gallery of their pictures.

    python workflows/run.py                  every workflow whose models are present
    python workflows/run.py NAME ...         only these: names from --list, the first part of one, or .json files
    python workflows/run.py --list           what there is
    python workflows/run.py --serve          ComfyUI with the pack, for a browser

It needs Python 3.10 or newer and pip. The first start makes an environment and gets ComfyUI, both in .cache;
later starts take seconds. Set COMFYUI_PATH to use your own ComfyUI instead, which is never written to.
Exit code: 0 if everything that could run did, 1 if a workflow failed or one that you named could not run,
2 for wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.append(str(ROOT / "workflows"))

from launcher import certificates, environment, execution, gallery, source, workflow_files  # noqa: E402
from launcher.server import Server, ServerError  # noqa: E402

CACHE = ROOT / ".cache"
# Marks a folder of pictures that a run made, and may empty again.
MARK = ".understudy-gallery"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows to run (default: all)")
    parser.add_argument(
        "--list", action="store_true", help="list the workflows and the model files that they need"
    )
    parser.add_argument("--serve", action="store_true", help="start ComfyUI with the pack, for a browser")
    parser.add_argument("--port", type=int, default=8188, help="port for --serve (default: 8188)")
    parser.add_argument(
        "--output", type=Path, default=CACHE / "gallery", metavar="DIR", help="where the gallery goes"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument(
        "--thumbnails",
        action="store_true",
        help="also write the picture of each workflow's template (maintainers)",
    )
    return parser.parse_args(arguments)


def list_workflows(workflows: list[workflow_files.Workflow]) -> None:
    for workflow in workflows:
        print(f"{workflow.stem}\n    {workflow.title}")
        for model in workflow.models():
            print(f"    needs {model['directory']}/{model['name']}")


def models_folder(comfyui: Path) -> Path:
    """The models folder of the user's own ComfyUI, or else one in the cache, for downloaded models."""
    if comfyui != source.cached(ROOT) and (comfyui / "models").is_dir():
        return comfyui / "models"
    (CACHE / "models").mkdir(parents=True, exist_ok=True)
    return CACHE / "models"


def serve(comfyui: Path, port: int, cpu: bool | None) -> int:
    """Run ComfyUI with the pack until it ends or Ctrl-C is pressed; returns the exit code."""
    options = ("--preview-method", "auto")
    base = CACHE / "serve"
    with Server(comfyui, base, models=models_folder(comfyui), port=port, cpu=cpu, options=options) as server:
        print(f"ComfyUI is ready: open {server.url} in a browser. Ctrl-C stops it.")
        print(
            f"The workflows are under Templates, Extensions. Pictures go to {base / 'output'}; log: {server.log}."
        )
        return server.process.wait()


class Progress:
    """What a workflow is doing: a progress bar on a terminal, a line per node elsewhere."""

    def __init__(self, name: str):
        # rich comes with comfy-cli.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.live = None
        self.title, self.total = name, 0
        self.started: list[str] = []
        console = Console()
        if console.is_terminal:
            columns = (TextColumn(name), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[node]}"))
            self.live = Progress(*columns, console=console, transient=True)
            self.task = self.live.add_task(name, total=None, node="")

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_exception) -> None:
        if self.live:
            self.live.stop()

    def show(self, event: dict) -> None:
        """Follow one event of the run."""
        kind = event.get("type")
        if kind == "queued":
            self.total = len(event["nodes"])
        elif kind in ("executing", "execution_cached"):
            if event["node"] in self.started:
                return
            self.started.append(event["node"])
            self.title = event["title"]
            self._draw(0, self.title)
            if not self.live:
                total = max(self.total, len(self.started))  # nodes may add others
                print(f"  [{len(self.started)}/{total}] {self.title}", flush=True)
        elif kind == "progress":
            steps = f"{event['completed']}/{event['total']}"
            self._draw(event["completed"] / max(1, event["total"]), f"{self.title} {steps}")

    def _draw(self, part: float, text: str) -> None:
        if self.live:
            done = max(0, len(self.started) - 1) + part
            self.live.update(self.task, total=max(self.total, len(self.started)), completed=done, node=text)


def run_workflow(server: Server, workflow: workflow_files.Workflow, output: Path) -> gallery.Entry:
    """Run one workflow and collect what it saved under `output`."""
    missing = server.missing(workflow.models())
    if missing:
        lines = [f"  {model['url']}\n    -> {model['directory']}/{model['name']}" for model in missing]
        return gallery.Entry(
            workflow, "skipped", "Its model files are missing. Download them:\n" + "\n".join(lines)
        )
    folder = output / workflow.stem
    check_replaceable(folder)
    with Progress(workflow.stem) as progress:
        result = execution.run(server, workflow.path, progress.show)
    entry = gallery.Entry(workflow, "failed" if result.error else "done", result.error or "", result.seconds)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    files = [file for file in result.files if gallery.is_shown(file["filename"])]
    main = gallery.main_file(files)
    for file in files:
        path = folder / f"{len(entry.files) + 1:02d}_{file['filename']}"
        path.write_bytes(server.view(file["filename"], file["subfolder"], file["type"]))
        entry.files.append((path, file["title"]))
        if file is main:
            entry.main = path
    return entry


def check_replaceable(folder: Path) -> None:
    """Raise SetupError if `folder`, which a run empties, holds files that no run made."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise source.SetupError(f"{folder} holds files that no run made: choose another --output.")


def report(entry: gallery.Entry) -> None:
    """Print how a workflow ended."""
    if entry.state == "done":
        print(f"done     {entry.workflow.stem}  {entry.seconds:.1f} s", flush=True)
    else:
        print(f"{entry.state:8} {entry.workflow.stem}\n{entry.message}", flush=True)


def machine(server: Server) -> str:
    """The device and versions that the pictures are made with, in one line."""
    stats = server.get("/system_stats")
    device = stats["devices"][0]
    name = (
        f"CPU, {os.cpu_count()} cores ({platform.machine()})" if device["type"] == "cpu" else device["name"]
    )
    system = stats["system"]
    return f"{name}; ComfyUI {system['comfyui_version']}, PyTorch {system['pytorch_version']}"


def write_gallery(entries: list[gallery.Entry], options: argparse.Namespace, description: str) -> None:
    """Write the pages and pictures of the workflows that have been run."""
    gallery.write_contact_sheet(entries, options.output / "contact_sheet.jpg")
    gallery.write_page(entries, options.output / "index.html", description)
    for entry in entries:
        if options.thumbnails and entry.state == "done" and entry.main:
            gallery.save_thumbnail(entry.main, entry.workflow.path.with_suffix(".jpg"))
    print(f"Gallery: {options.output / 'index.html'}", flush=True)


def run(options: argparse.Namespace, workflows: list[workflow_files.Workflow], comfyui: Path) -> int:
    """Run the workflows on one server and write the gallery; returns the exit code."""
    entries, description = [], ""
    options.output.mkdir(parents=True, exist_ok=True)
    models = models_folder(comfyui)
    # A run's pictures and trained files do not pile up: they are deleted when the server has stopped.
    try:
        with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE) as base:
            if lent := certificates.lend(ROOT, Path(base)):
                print(f"Label Media signs with the certificate in {lent}.")
            print("Starting ComfyUI", flush=True)
            with Server(comfyui, Path(base), models=models, cpu=options.cpu or None) as server:
                description = machine(server)
                print(description, flush=True)
                for workflow in workflows:
                    entries.append(run_workflow(server, workflow, options.output))
                    report(entries[-1])
                    if not server.alive():
                        break
    finally:  # stopped by Ctrl-C as well
        if entries:
            write_gallery(entries, options, description)
    if any(entry.state == "skipped" for entry in entries):
        print(f"Put model files into the folders of {models}.")
    # A skipped workflow counts as a failure only if the user named it.
    wanted = ("done",) if options.names else ("done", "skipped")
    return 0 if len(entries) == len(workflows) and all(entry.state in wanted for entry in entries) else 1


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        workflows = workflow_files.find(ROOT / "workflows", options.names)
    except source.SetupError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        list_workflows(workflows)
        return 0
    environment.enter(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Shells start background jobs with Ctrl-C ignored, which every child process would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        comfyui = source.obtain(ROOT)
        if options.serve:
            return serve(comfyui, options.port, options.cpu or None)
        return run(options, workflows, comfyui)
    except (source.SetupError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
