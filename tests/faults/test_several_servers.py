"""A casting sheet on two servers with one output folder, by the commands of workflows/SERVERS.md."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from faults import prompts
from launcher.scripts import ROOT
from launcher.server import Server

PAGE = ROOT / "workflows" / "SERVERS.md"
IDENTITIES = ["red robot", "blue cat", "green bear", "yellow fox"]
ACTIONS = ["waving", "sitting"]


def command(workflow: str, server: Server) -> list[str]:
    """What the page says for this workflow, for this server."""
    pattern = rf"do (comfy run --workflow {workflow} .*?) \|\| break; done"
    (line,) = re.findall(pattern, PAGE.read_text(encoding="utf-8"))
    words = shlex.split(line)[1:]
    words[words.index("--host") + 1], words[words.index("--port") + 1] = "127.0.0.1", str(server.port)
    return [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *words]


def start(workflow: str, server: Server, folder) -> subprocess.Popen:
    # comfy-cli keeps settings and a list of jobs in the home folder.
    changes = {"HOME": str(folder), "USERPROFILE": str(folder), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment = {**os.environ, **changes}
    return subprocess.Popen(
        command(workflow, server), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, text=True, encoding="utf-8", errors="replace",
    )


def run(workflow: str, server: Server, folder) -> tuple[int, str]:
    """The code that a run ends with, and what it said."""
    process = start(workflow, server, folder)
    said = process.communicate(timeout=900)[0]
    return process.returncode, said


def test_what_a_killed_server_leaves_is_made_by_the_other(comfy_path, tmp_path):
    output = tmp_path / "shared"
    casting = output / "casting"
    options = ("--output-directory", str(output))
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        first, second = pool.map(
            stack.enter_context,
            [Server(comfy_path, tmp_path / name, cpu=True, options=options) for name in ("first", "second")],
        )
        for name, lines in (("first", IDENTITIES[:2]), ("second", IDENTITIES[2:]), ("whole", IDENTITIES)):
            prompt = prompts.sheet(first, lines, ACTIONS, [], at_once=2)
            (tmp_path / f"{name}.json").write_text(json.dumps(prompt), encoding="utf-8")

        def pictures() -> list:
            return list(casting.glob("theatre_*.png")) if casting.is_dir() else []

        code, said = run("second.json", second, tmp_path)
        assert code == 0, said
        running = start("second.json", second, tmp_path)
        while not second.get("/queue")["queue_running"]:
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.01)
        second.process.kill()
        second.process.wait()
        said = running.communicate(timeout=900)[0]
        assert running.returncode, f"the loop would not have ended: {said}"
        assert len(pictures()) in (2, 3), "some of its part, and not all"

        for _ in range(2):
            code, said = run("first.json", first, tmp_path)
            assert code == 0, said
        assert len([path for path in pictures() if re.match("theatre_(red|blue)", path.name)]) == 4

        for _ in range(3):
            code, said = run("whole.json", first, tmp_path)
            assert code == 0, said
    whole = Counter(path.name.rsplit("_", 2)[0] for path in pictures() if prompts.is_whole(path))
    assert len(whole) == len(IDENTITIES) * len(ACTIONS) and set(whole.values()) == {1}, whole
