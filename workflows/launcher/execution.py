"""Runs a UI-format workflow on a server through comfy-cli, which converts it, queues it and reports progress."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .server import Server

# comfy-cli gives up after this many seconds without a message, and loading or training may be silent for long.
SILENCE_SECONDS = 24 * 3600


@dataclasses.dataclass
class Result:
    """How one workflow ended: `error` is None, or names the node (id, title, type) that failed and why."""

    files: list[dict] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def run(server: Server, workflow: Path, on_event: Callable[[dict], None] = lambda event: None) -> Result:
    """Run the workflow file to its end.

    `on_event` gets comfy-cli's events as they come: `queued` with its `nodes`, `executing` and
    `execution_cached` with their `node` and `title`, `progress` (`completed` of `total`), and `executed`.
    `Result.files` are the saved files in order: `filename`, `subfolder`, `type` ("output" or "temp"), and the
    `node_id` and `title` of the node.
    """
    result = Result()
    titles: dict[str, str] = {}
    envelope: dict = {}
    started = time.monotonic()
    problems = tempfile.TemporaryFile()  # a pipe would fill up, since nobody reads it meanwhile
    process = subprocess.Popen(
        _command(server, workflow),
        env=_environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=problems,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        for line in process.stdout:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("type") == "envelope":
                envelope = event
            elif event.get("type") == "prompt_preview":
                titles = {node: _label(node, content) for node, content in event["prompt"].items()}
            elif event.get("type") == "executed":
                shown = {_place(file) for file in result.files}  # a casting sheet is drawn twice in a run
                result.files += [file for file in event["outputs"] if _place(file) not in shown]
            on_event(event)
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        problems.seek(0)
        complaint = problems.read().decode(errors="replace").strip()
        problems.close()
    # The time of the run without comfy-cli's start, if comfy-cli reports it.
    result.seconds = (envelope.get("data") or {}).get("elapsed_seconds", time.monotonic() - started)
    if not server.alive():
        result.error = f"ComfyUI itself ended. The last lines of its log:\n{server.tail()}"
    elif process.returncode:
        error = envelope.get("error") or {"message": complaint or "comfy-cli ended without a result."}
        result.error = describe(error, titles)
    return result


def describe(error: dict, titles: dict[str, str]) -> str:
    """comfy-cli's error as text: a line for each node at fault, as `node 3 "Title" (Type): message`."""
    details = error.get("details") or {}
    if "node_id" in details:
        return (
            f"{titles.get(details['node_id'], 'node ' + details['node_id'])}: {details['exception_message']}"
        )
    lines = []
    for record in details.get("node_errors") or details.get("errors") or []:
        label = titles.get(record["node_id"], "node " + record["node_id"])
        # The server lists several reasons under each node; comfy-cli's own check gives one.
        for reason in record.get("errors", [record]):
            parts = (reason.get("message"), reason.get("details") or reason.get("hint"))
            lines.append(label + ": " + "; ".join(part for part in parts if part))
    return "\n".join(lines) or " ".join(part for part in (error["message"], error.get("hint")) if part)


def _place(file: dict) -> tuple[str, str, str]:
    return file["type"], file["subfolder"], file["filename"]


def _label(node: str, content: dict) -> str:
    return f'node {node} "{content["_meta"]["title"]}" ({content["class_type"]})'


def _command(server: Server, workflow: Path) -> list[str]:
    return [
        sys.executable,
        str(Path(__file__).with_name("several_choices.py")),
        "--skip-prompt",
        "--no-enable-telemetry",
        "--json-stream",
        "run",
        "--workflow",
        str(workflow),
        "--wait",
        "--host",
        "127.0.0.1",
        "--port",
        str(server.port),
        "--timeout",
        str(SILENCE_SECONDS),
        "--where",
        "local",
        "--no-notify",
    ]


def _environment(server: Server) -> dict[str, str]:
    # comfy-cli keeps settings and a job list in the home folder: those of the user stay untouched.
    home = server.base / "comfy-cli"
    home.mkdir(exist_ok=True)
    changes = {"HOME": str(home), "USERPROFILE": str(home), "PYTHONIOENCODING": "utf-8", "DO_NOT_TRACK": "1"}
    return {**os.environ, **changes, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
