"""tests/benchmarks/run.py: a cheap part from end to end, what is there is not measured again, and its own faults."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from benchmarks import kit, run
from launcher.scripts import ROOT


def started(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")


def test_a_part_is_measured_once(tmp_path):
    results = tmp_path / "results.json"
    arguments = ("--results", str(results), "--patience", "20", "--parts", "kernels", "video, compiled")
    first = started(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    written = json.loads(results.read_text(encoding="utf-8"))
    assert {name: part["state"] for name, part in written["parts"].items()} == {
        "kernels": "done", "video, compiled": "waits"
    }
    checks = [found for found in written["parts"]["kernels"]["found"] if "check" in found]
    assert len(checks) > 12 and all(found["difference"] <= found["limit"] for found in checks)
    assert {"device", "torch", "commit", "rounds"} <= set(written["machine"])
    assert "video, compiled: waits for a GPU" in first.stdout
    second = started(*arguments)
    assert second.returncode == 0 and "kernels:" not in second.stdout
    assert json.loads(results.read_text(encoding="utf-8")) == written


SAYS = """
import json, sys, time
def say(**what): print("\\x1e" + json.dumps(what), flush=True)
say(machine={"device": "cpu"})
for name in sys.argv[1:]:
    say(begin=name)
    say(name="R", values=[1.5, 1.0], shape="s", unit="", goal="≤ 1.2", counted=None, least=False, decides=True)
    if name == "video": print("the last words"); sys.exit(3)
    if name == "guidance": time.sleep(600)
    say(end="done")
"""


def test_parts_that_die_or_take_too_long_leave_what_they_found(tmp_path, capsys):
    chosen, path, results = ["kernels", "video", "guidance", "capture"], tmp_path / "results.json", {}

    def measuring(parts: list[str]) -> run.Measuring:
        return run.Measuring([sys.executable, "-c", SAYS], dict(os.environ), 8 / run.SECONDS_ON_CPU, parts)

    run.supervise(chosen, path, results, measuring)
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        "kernels": "done", "video": "failed", "guidance": "failed", "capture": "done"
    }
    assert parts["video"]["error"] == "ended\nthe last words" and "took longer" in parts["guidance"]["error"]
    assert all(len(part["found"]) == 1 for part in parts.values())
    lines = run.table(results).splitlines()
    assert sum("1.2500" in line and line.endswith("missed") for line in lines) == 4
    assert any(line.startswith("video: ended") for line in lines)


def test_no_part_is_begun_when_the_time_is_used_up_and_another_start_goes_on(tmp_path, capsys):
    path, results = tmp_path / "results.json", {}

    def measuring(parts: list[str]) -> run.Measuring:
        return run.Measuring([sys.executable, "-c", SAYS], dict(os.environ), 1, parts)

    results["parts"] = {"kernels": {"state": "failed", "found": []}}
    chosen = ["kernels", "capture", "maps", "gradients"]
    for done, left in (1, "maps, gradients, kernels"), (2, "gradients, kernels"):
        run.supervise(chosen, path, results, measuring, limit=0)
        states = [part["state"] for part in json.loads(path.read_text(encoding="utf-8"))["parts"].values()]
        assert states == ["failed", *["done"] * done]
        assert f"Left are {left};" in capsys.readouterr().out
    run.supervise(chosen, path, results, measuring)
    assert all(results["parts"][name]["state"] == "done" for name in chosen)
    assert "Left are" not in capsys.readouterr().out


def test_results_of_another_machine_are_not_mixed(tmp_path):
    path, results = tmp_path / "results.json", {"machine": {"device": "cuda"}}
    with pytest.raises(SystemExit, match="device was cuda and is cpu"):
        run.supervise(["kernels"], path, results, lambda parts: run.Measuring(
            [sys.executable, "-c", SAYS], dict(os.environ), 1, parts
        ))


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "missed"), ({"goal": "≥ 1.2"}, "met"), ({"decides": False}, "waits for a GPU"),
    ({"least": True, "counted": 1.3}, "measured wrongly, since it is less than the FLOPs allow"),
])
def test_what_a_figure_says(changes, expected):
    figure = {"values": [1.25], "goal": "≤ 1.2", "decides": True, "least": False, "counted": None}
    assert run.verdict(figure | changes) == expected


def test_every_node_that_changes_a_model_or_a_sampler_is_measured():
    from benchmarks import apply_nodes
    from comfy_api.latest import io
    from pack.nodes import extension

    changing = {
        node.define_schema().display_name.split(" (")[0] for node in [*extension.METHOD_NODES, *extension.ADDED_NODES]
        if any(isinstance(output, io.Model.Output | io.Sampler.Output) for output in node.define_schema().outputs)
    }
    assert changing == set(apply_nodes.NODES) and len(changing) > 6
    families = ["SD 1.5", "SDXL", "Wan 2.1 14B", "Flux.1"]
    assert all(any(apply_nodes.takes(node, family) for family in families) for node in apply_nodes.NODES.values())


def test_a_step_with_a_recorder_is_checked_against_whole_maps():
    from benchmarks import token_attention
    from support import benchmark

    found = []
    report = benchmark.Report(torch.device("cpu"), torch.float32, True, 1, found.append)
    token_attention.Step("SD 1.5", report).check(report, "SD 1.5")
    assert [check["limit"] for check in found] == [1e-4]


def test_reference_weight_is_measured_beside_the_same_reference():
    from benchmarks import apply_nodes
    from support import benchmark

    found = []
    apply_nodes.measure_flux(benchmark.Report(torch.device("cpu"), torch.float32, True, 1, found.append))
    assert [figure["name"] for figure in found] == 2 * ["plain", "Reference Weight"]


def test_the_kit_can_be_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "ARCHIVE", tmp_path / "kit.zip")
    made = kit.make(ROOT)
    names = zipfile.ZipFile(made).namelist()
    assert made.stat().st_size <= kit.LARGEST
    assert {"commit", "comfyui/main.py", "comfyui/comfy/sd.py", "site/comfy_kitchen/__init__.py"} <= set(names)
    with kit.unpack(ROOT) as folder:
        assert (tmp_path / folder / "comfyui" / "execution.py").is_file()


# On the path of every Python that the test below starts: nothing of what a machine without a network may lack.
WITHOUT = """
import importlib.machinery, socket, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        kit = found and "understudy-kit-" in f"{found.origin} {found.submodule_search_locations}"
        return None if name.partition(".")[0] in {missing} and not kit else found

def connect(*_):
    raise OSError("there is no network here")

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
socket.socket.connect = connect
"""


def test_the_kit_is_enough_where_nothing_else_is(tmp_path, monkeypatch):
    """A copy of the tree without ComfyUI, and a Python without the packages that have stand-ins or are in the kit."""
    tree, blocked = tmp_path / "tree", tmp_path / "blocked"
    for folder in ("kernels", "nodes", "tests/benchmarks", "tests/support", "workflows/launcher"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / file, tree / file)
    monkeypatch.setattr(kit, "ARCHIVE", tree / kit.ARCHIVE)
    kit.ARCHIVE.parent.mkdir()
    kit.make(ROOT)
    blocked.mkdir()
    missing = {*kit.STAND_INS, *kit.PACKAGES, "comfyui_frontend_package"}
    (blocked / "sitecustomize.py").write_text(WITHOUT.replace("{missing}", repr(missing)))
    variables = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    script = tree / "tests" / "benchmarks" / "run.py"
    command = [sys.executable, str(script), "--patience", "20", "--parts", "kernels"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**variables, "PYTHONPATH": str(blocked)}, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tree / run.RESULTS).read_text(encoding="utf-8"))
    assert results["parts"]["kernels"]["state"] == "done"
    assert {"PIL", "aiohttp", "scipy"} <= set(results["machine"]["without"])


def test_the_guide_s_table_is_the_command_s():
    """A row of it; the others take minutes."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "training_needs.py"), "SD 1.5"]
    printed = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    guide = (ROOT / "workflows" / "TRAINING.md").read_text(encoding="utf-8").splitlines()
    head, _, row = (line for line in printed.splitlines() if line.startswith("|"))
    assert head in guide and row in guide and row.startswith("| prior, SD 1.5")


def test_a_stand_in_is_good_for_a_place_and_not_for_a_call():
    module = kit._Module("PIL")
    assert isinstance(module.Image.Image, type)
    with pytest.raises(RuntimeError, match="not installed here"):
        module.Image.open("x")
