"""A real ComfyUI server with this pack as its only custom node, started and stopped by a script or a test."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from . import source
from .scripts import ROOT

PACK_NAME = "ComfyUI-Understudy"
READY_SECONDS = 300
LOG_LINES = 40
# Polls in a row that may fail, in 30 seconds: a server short of memory drops connections for a while.
POLL_SECONDS, LOST_POLLS = 0.03, 1000
# A server on this machine is never reached through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """The server did not start, did not load the pack or refused a prompt; the message quotes the log."""


def free_port() -> int:
    """A TCP port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    """True if something on this machine listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def has_accelerator() -> bool:
    """True if PyTorch sees a GPU (CUDA, ROCm, XPU or MPS)."""
    import torch

    return torch.accelerator.is_available()


def link_folder(target: Path, link: Path) -> None:
    """Make `link` lead to the folder `target`: a symbolic link, or a junction where Windows forbids those."""
    if os.path.lexists(str(link)):
        if os.path.exists(str(link)) and os.path.samefile(str(link), str(target)):
            return
        os.unlink(str(link))
    try:
        os.symlink(str(target), str(link), target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi

        _winapi.CreateJunction(str(target), str(link))


class Server:
    """The ComfyUI in the folder `comfyui`, which writes only to the folder `base`.

    `pack` is linked as `base/custom_nodes/<name>` and is the only pack loaded. `models` is a models folder to
    read from instead of `base/models`. `cpu=None` uses the CPU only where PyTorch sees no accelerator.
    `port=0` takes a free port. `options` are further arguments for ComfyUI's main.py.

    Use it as a context manager. Entering raises ServerError with the log's last lines if ComfyUI does not start,
    or starts without the pack's nodes.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        pack: Path = ROOT,
        name: str = PACK_NAME,
        models: Path | None = None,
        cpu: bool | None = None,
        port: int = 0,
        options: tuple[str, ...] = (),
        ready_seconds: float = READY_SECONDS,
    ):
        self.comfyui, self.base, self.pack, self.name, self.models = comfyui, base, pack, name, models
        self.cpu = cpu
        self.port = port
        self.options = options
        self.ready_seconds = ready_seconds
        self.log = base / "comfyui.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link_folder(self.pack, self.base / "custom_nodes" / self.name)
        # ComfyUI's example pictures, for workflows in which the user has not chosen pictures yet.
        for picture in (self.comfyui / "input").glob("example.*"):
            if not (self.base / "input" / picture.name).exists():
                shutil.copy(str(picture), str(self.base / "input"))
        if self.port and answers(self.port):
            raise ServerError(
                f"Port {self.port} is in use, maybe by another ComfyUI: stop that one, or choose another with --port."
            )
        self.port = self.port or free_port()
        with open(str(self.log), "wb") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=str(self.base),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
            self._check_pack()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        self.stop()

    def _command(self) -> list[str]:
        cpu = not has_accelerator() if self.cpu is None else self.cpu
        return [
            sys.executable,
            "-u",
            str(self.comfyui / "main.py"),
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--database-url",
            "sqlite:///:memory:",
            *(["--models-directory", str(self.models)] if self.models else []),
            *(["--cpu"] if cpu else []),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            self.name,
            *self.options,
        ]

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
        # With the pack's folder on PYTHONPATH, its nodes/ would hide ComfyUI's nodes.py.
        environment.pop("PYTHONPATH", None)
        if self.comfyui != source.cached(ROOT):
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        return environment

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(
                    f"ComfyUI ended with code {self.process.returncode} while it started:\n{self.tail()}"
                )
            try:
                self.get("/system_stats", timeout=5)
                return
            except OSError:
                time.sleep(0.2)
        raise ServerError(
            f"ComfyUI was not ready after {self.ready_seconds:.0f} seconds. The last lines of its log:\n{self.tail()}"
        )

    def _check_pack(self) -> None:
        failed = any("(IMPORT FAILED)" in line and self.name in line for line in self._log_lines())
        if failed or not self.node_ids():
            raise ServerError(f"ComfyUI started, but the pack did not load:\n{self.import_problem()}")

    def _log_lines(self) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()

    def import_problem(self) -> str:
        """What the log says about a pack that did not load: the traceback, if ComfyUI logged one."""
        lines = self._log_lines()
        starts = ("Traceback", "Error while calling", "Cannot import", "Skip ")
        first = next((index for index, line in enumerate(lines) if any(start in line for start in starts)), 0)
        last = next((index for index, line in enumerate(lines) if "Import times" in line), len(lines))
        return "\n".join(lines[first:last]).strip()

    def tail(self, lines: int = LOG_LINES) -> str:
        """The last lines of the server's log."""
        return "\n".join(self._log_lines()[-lines:])

    def alive(self) -> bool:
        """True while the server's process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the server and every process that it started."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self._signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else signal.SIGTERM)
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
                self.process.wait()
        self.process = None

    def _signal(self, number: int) -> None:
        if sys.platform == "win32":
            self.process.send_signal(number)
        else:
            os.killpg(self.process.pid, number)

    def get(self, path: str, timeout: float = 60):
        """The JSON response to GET `path`. Raises OSError (urllib's errors) if there is none."""
        with _OPENER.open(self.url + path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict, timeout: float = 60):
        """The JSON response to POST `path` with the JSON `body`, or None if it is empty."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with _OPENER.open(request, timeout=timeout) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def object_info(self) -> dict:
        """Every node of the server: {node id: schema}."""
        return self.get("/object_info")

    def node_info(self, node_id: str) -> dict:
        """The schema of one node."""
        return self.get("/object_info/" + urllib.parse.quote(node_id))[node_id]

    def node_ids(self) -> list[str]:
        """The ids of the pack's nodes, sorted."""
        module = "custom_nodes." + self.name
        return sorted(name for name, node in self.object_info().items() if node["python_module"] == module)

    def model_names(self, folder: str) -> list[str]:
        """The files that the server offers in the model folder `folder`; empty if it knows no such folder."""
        try:
            return [name.replace("\\", "/") for name in self.get("/models/" + urllib.parse.quote(folder))]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise

    def missing(self, models: list[dict]) -> list[dict]:
        """Those of these model files (`name`, `directory`) that the server does not have."""
        return [model for model in models if model["name"] not in self.model_names(model["directory"])]

    def submit(self, prompt: dict) -> str:
        """Queue an API-format prompt and return its id. Raises ServerError, with the reasons, if it is refused."""
        try:
            return self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ServerError(f"ComfyUI refused the prompt: {error.read().decode()}") from error

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """Wait until a prompt has ended and return its history entry; `entry["status"]["status_str"]` says how.

        Raises ServerError if ComfyUI ends, gives no answer to LOST_POLLS polls in a row, or needs longer.
        """
        deadline, lost = time.monotonic() + timeout, 0
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(f"ComfyUI ended while it was running a prompt:\n{self.tail()}")
            try:
                entry, lost = self.get("/history/" + prompt_id).get(prompt_id), 0
            except (OSError, http.client.HTTPException) as error:
                entry, lost = None, lost + 1
                if lost > LOST_POLLS:
                    raise ServerError(f"ComfyUI runs and gives no answer ({error}):\n{self.tail()}") from error
            if entry:
                return entry
            time.sleep(POLL_SECONDS)
        raise ServerError(f"The prompt did not end within {timeout:.0f} seconds:\n{self.tail()}")

    def queue(self, prompt: dict, timeout: float = 600) -> dict:
        """Run an API-format prompt to its end and return its history entry."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self) -> None:
        """Stop the running prompt."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unload the models and empty the cache of node results, as soon as the queue is empty."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The content of a file that a prompt saved."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        with _OPENER.open(f"{self.url}/view?{query}", timeout=60) as answer:
            return answer.read()
