"""The set-up of the two commands: what it refuses, repeats and skips."""

import ast
import collections
import importlib.util
import os
import subprocess
import sys

import pytest
from launcher import environment, locks, scripts, source


def make_pack(root):
    comfyui = source.cached(root)
    for file in (root / "workflows" / "launcher" / "requirements.txt", root / "requirements.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one==1\n")
    for name in source.LANDMARKS:
        (comfyui / name).parent.mkdir(parents=True, exist_ok=True)
        (comfyui / name).write_text("two==2\n")
    return comfyui


def free(monkeypatch, size):
    usage = collections.namedtuple("usage", "free")(size)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A pack with a cached ComfyUI and an empty environment, and a list of what pip was asked to install."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    make_pack(tmp_path)
    installed = []
    monkeypatch.setattr(environment, "works", lambda python: True)
    monkeypatch.setattr(environment, "install", lambda python, files, log: installed.append(files))
    free(monkeypatch, 10**12)  # nothing is installed, so the machine's own disk does not matter
    (tmp_path / ".cache" / "env").mkdir()
    return tmp_path, installed


def test_an_old_python_is_told_which_to_install():
    with pytest.raises(source.SetupError, match="Python 3.9 is too old: install Python 3.12"):
        environment.check_python((3, 9))
    environment.check_python((3, 10))


def test_an_old_python_can_read_that_message(pack_root):
    files = [pack_root / "workflows" / "run.py", pack_root / "tests" / "run.py"]
    files += (pack_root / "workflows" / "launcher").glob("*.py")
    assert len(files) > 5
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), filename=str(file), feature_version=(3, 8))


def test_the_second_start_installs_nothing(pack):
    root, installed = pack
    environment.ensure(root)
    environment.ensure(root)
    assert len(installed) == 1
    assert [file.parent.name for file in installed[0]] == ["launcher", root.name, source.cached(root).name]


@pytest.mark.parametrize("name", ["workflows/launcher/requirements.txt", "requirements.txt"])
def test_a_changed_requirement_installs_again(pack, name):
    root, installed = pack
    environment.ensure(root)
    (root / name).write_text("one==2\n")
    environment.ensure(root)
    assert len(installed) == 2


def test_an_interrupted_installation_is_repeated(pack, monkeypatch):
    root, installed = pack

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as first, pytest.raises(KeyboardInterrupt):
        first.setattr(environment, "install", interrupted)
        environment.ensure(root)
    environment.ensure(root)
    assert len(installed) == 1


def test_a_broken_environment_is_created_again(pack, monkeypatch):
    root, installed = pack
    environment.ensure(root)
    created = []
    monkeypatch.setattr(environment, "works", lambda python: False)
    monkeypatch.setattr(environment, "make", created.append)
    environment.ensure(root)
    assert created == [root / ".cache" / "env"] and len(installed) == 2


def test_a_full_disk_is_named_before_anything_is_installed(pack, monkeypatch):
    root, installed = pack
    free(monkeypatch, 11 * 10**9)
    with pytest.raises(source.SetupError, match="11.0 GB free and 12 GB are needed"):
        environment.ensure(root)
    assert not installed


def test_a_failing_pip_shows_its_last_lines(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{tmp_path}/missing-1.0-py3-none-any.whl\n")
    with pytest.raises(source.SetupError, match="(?s)missing-1.0.*it goes on where it stopped"):
        environment.install(sys.executable, [requirements], tmp_path / "setup.log")


def test_what_pip_leaves_uncompiled_is_compiled_and_no_python_is_no_error(tmp_path):
    (tmp_path / "package").mkdir()
    modules = [tmp_path / "package" / "good.py", tmp_path / "package" / "template.py"]
    for module, text in zip(modules, ("x = 1\n", "def {{ name }}:\n"), strict=True):
        module.write_text(text)
    environment.compile_all(sys.executable, str(tmp_path))
    assert [os.path.exists(importlib.util.cache_from_source(str(module))) for module in modules] == [True, False]


def test_a_python_without_venv_is_told_what_to_install(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho ensurepip is not available; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(environment.sys, "executable", str(script))
    with pytest.raises(source.SetupError, match="(?s)ensurepip.*python3-venv"):
        environment.make(tmp_path / "env")


def test_the_lock_keeps_a_second_process_out(tmp_path, pack_root):
    code = (
        f"import sys; sys.path.insert(0, {str(pack_root / 'workflows')!r})\n"
        "from launcher import locks\n"
        f"print(locks._try_lock(open({str(tmp_path / 'lock')!r}, 'a+b')))"
    )
    with locks.locked(tmp_path / "lock"):
        inside = subprocess.check_output([sys.executable, "-c", code], text=True)
    after = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert (inside.strip(), after.strip()) == ("False", "True")


@pytest.mark.parametrize(("arguments", "alone"), [
    ([], False), (["-q", "--soak"], False), (["tests/launcher"], True), (["-q", "-k", "cancel"], True),
    (["-n", "3"], True), (["-x", "--pdb"], True),
])
def test_the_whole_suite_runs_on_every_core_and_what_is_named_in_one_process(arguments, alone, monkeypatch):
    spec = importlib.util.spec_from_file_location("suite", scripts.ROOT / "tests" / "run.py")
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 6)
    together = ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert suite.side_by_side(arguments) == ([] if alone else together)
