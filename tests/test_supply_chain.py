"""The published pack runs no foreign code, starts no process and opens no connection."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from launcher.scripts import ROOT
from support.shipped import shipped_files, shipped_modules, tree

BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
MODULES = {
    "subprocess", "multiprocessing", "socket", "socketserver", "ssl", "select", "asyncio", "pty",
    "ctypes", "cffi", "urllib", "urllib3", "http", "httpx", "aiohttp", "requests", "ftplib", "smtplib",
    "telnetlib", "xmlrpc", "webbrowser", "huggingface_hub", "pip", "ensurepip", "setuptools", "venv",
    "marshal", "shelve", "dill",
    "cloudpickle", "joblib", "code", "runpy", "builtins", "importlib", "imp", "zipimport", "pickle",
}
ALLOWED_NAMES = {("pickle", "UnpicklingError")}
ALLOWED_MODULES = {"importlib.util", "importlib.metadata", "importlib.resources"}
OS_CALLS = {"system", "popen", "fork", "forkpty", "startfile", "posix_spawn", "posix_spawnp"}
ATTRIBUTES = {
    "from_pretrained", "hf_hub_download", "snapshot_download", "load_state_dict_from_url", "hub",
    "cpp_extension", "load_inline", "allow_pickle", "module_from_spec", "spec_from_file_location",
}
UNPICKLING = {("torch", "load"), ("torch", "save"), ("torch", "hub"), ("np", "load"), ("numpy", "load")}


def findings(module: ast.Module) -> Iterator[str]:
    """What the rules forbid in a file."""
    for node in ast.walk(module):
        place = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES and alias.name not in ALLOWED_MODULES:
                    yield f"{place}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                source = node.module.split(".")[0]
                allowed = node.module in ALLOWED_MODULES or (node.module, alias.name) in ALLOWED_NAMES
                if source in MODULES and not allowed:
                    yield f"{place}: from {node.module} import {alias.name}"
                if source == "os" and (alias.name in OS_CALLS or alias.name.startswith(("exec", "spawn"))):
                    yield f"{place}: from os import {alias.name}"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
            yield f"{place}: {node.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = node.value.id, node.attr
            if owner == "os" and (name in OS_CALLS or name.startswith(("exec", "spawn"))):
                yield f"{place}: os.{name}"
            if (owner, name) in UNPICKLING:
                yield f"{place}: {owner}.{name}"
            if name in ATTRIBUTES:
                yield f"{place}: .{name}"
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield f"{place}: .{node.attr}"
        elif isinstance(node, ast.Call) and any(word.arg == "trust_remote_code" for word in node.keywords):
            yield f"{place}: trust_remote_code"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if "weights_only=True" not in [ast.unparse(word) for word in node.keywords]:
                yield f"{place}: torch.load without weights_only=True"


@pytest.mark.parametrize("code", [
    "eval('1')", "exec(x)", "run = eval", "compile(x, '', 'exec')", "__import__('os')", "import subprocess",
    "import subprocess as s", "from subprocess import run", "import os\nos.system('ls')",
    "from os import popen",
    "import os\nos.execv('a', [])", "import urllib.request", "from urllib.request import urlopen",
    "import requests",
    "import socket", "from pip import main", "import pickle", "from pickle import loads", "import importlib",
    "from huggingface_hub import hf_hub_download", "AutoModel.from_pretrained('a/b')", "torch.load(p)",
    "torch.load(p, weights_only=False)", "torch.hub.load('a', 'b')", "x(trust_remote_code=True)",
    "import ctypes",
    "import importlib.util\nimportlib.util.module_from_spec(s)", "def f():\n    import socket",
    "torch.save(x, p)", "np.load(p)",
])
def test_the_scan_finds(code):
    assert list(findings(ast.parse(code)))


@pytest.mark.parametrize("code", [
    "torch.compile(model)", "re.compile('a')", "import os\nos.path.join('a')", "from . import requests",
    "from .socket import plug", "def evaluate(): pass", "from pickle import UnpicklingError",
    "import importlib.util\nimportlib.util.find_spec('triton')",
    "class T:\n    @staticmethod\n    def from_pretrained(path): pass",
])
def test_the_scan_passes(code):
    assert list(findings(ast.parse(code))) == []


def test_nothing_forbidden_stands_in_what_ships():
    assert "nodes/files/pickles.py" in shipped_modules() and "__init__.py" in shipped_modules()
    violations = [f"{name}, {finding}" for name in shipped_modules() for finding in findings(tree(name))]
    assert violations == []


def test_only_the_pack_s_own_kinds_of_files_ship():
    modules = [name for name in shipped_modules() if not name.startswith(("nodes/", "kernels/"))]
    assert modules == ["__init__.py"], "Keep tests and runners out of the published pack with .comfyignore"
    endings = {Path(name).suffix for name in shipped_files()}
    binaries = {".so", ".pyd", ".dll", ".dylib", ".exe", ".whl", ".sh", ".bat", ".ps1", ".pkl", ".pt"}
    assert not endings & binaries


HEAVY = ("diffusers", "transformers", "peft")


def test_heavy_libraries_are_imported_where_they_are_used():
    """At the top of a file they would slow down every start of ComfyUI."""
    late = []
    for name in shipped_modules():
        for node in tree(name).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            late += [f"{name}: {top}" for top in names if top.split(".")[0] in HEAVY]
    assert late == []


IMPORT = """
import asyncio, sys
sys.path.append({workflows!r})
from launcher import scripts
scripts.alias_pack()
scripts.add_comfy_path(__import__("pathlib").Path({base!r}))
import comfy_api.latest, comfy.sd, nodes, latent_preview
before = set(sys.modules)
forbidden = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
             "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "urllib.Request")
def watch(event, arguments):
    if event in forbidden:
        raise RuntimeError("the pack did " + event)
sys.addaudithook(watch)
import pack
import importlib.util
spec = importlib.util.spec_from_file_location(
    "root_alone", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("ROOT", *sorted(name for name in set(sys.modules) - before if not name.startswith("importlib")))
from pack.nodes.extension import UnderstudyExtension
extension = UnderstudyExtension()
async def load():
    await extension.on_load()
    return await extension.get_node_list()
loop = asyncio.new_event_loop()
classes = loop.run_until_complete(load())
for node in classes:
    node.GET_SCHEMA()
print("NODES", len(classes))
print("ADDED", *sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


def test_the_import_adds_little_and_touches_no_network_or_process(tmp_path):
    """In a new process, after ComfyUI: every module of the pack, its folders and all its schemas."""
    code = IMPORT.format(workflows=str(ROOT / "workflows"), base=str(tmp_path), root=str(ROOT))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.split()}
    assert answers["ROOT"] == [], "the pack's root imports something before ComfyUI asks for its nodes"
    assert int(answers["NODES"][0]) > 0
    foreign = set(answers["ADDED"]) - set(sys.stdlib_module_names) - {"pack"}
    assert foreign == set(), "import these inside the functions that need them"


def test_requirements_agree_with_the_project_file():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]["dependencies"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if line and not line.startswith("#")) == sorted(project)
