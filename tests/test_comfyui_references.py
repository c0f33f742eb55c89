"""Every name that the pack takes of ComfyUI exists in the ComfyUI at hand; a newer one's missing name is one line."""

import pytest
from launcher import source
from support import host_references

FOLDERS = ("nodes", "workflows", "tests")


def test_this_comfyui_has_every_name_that_the_pack_takes(pack_root, comfy_path):
    files = [pack_root / "__init__.py", *(file for folder in FOLDERS for file in (pack_root / folder).rglob("*.py"))]
    lines = host_references.missing(files, pack_root, comfy_path)
    assert not lines, "\n".join([f"ComfyUI {source.version_of(comfy_path)} lacks what the pack needs:", *lines])


def test_the_pack_s_own_files_have_many(pack_root, comfy_path):
    """Else the test above would look at nothing."""
    host = host_references.Host(comfy_path)
    names = {
        reference.name for file in (pack_root / "nodes").rglob("*.py")
        for reference in host_references.references(file, pack_root, host)
    }
    assert len(names) > 150 and {"comfy.samplers.calc_cond_batch", "comfy.patcher_extension.WrappersMP"} < names


@pytest.mark.parametrize(("code", "line"), [
    ("import comfy.gone", "1: comfy has no gone"),
    ("import gone", None),
    ("from comfy.tools import Kind, gone", "1: comfy.tools has no gone"),
    ("import comfy.tools\n\ndef f():\n    return comfy.tools.gone(1)", "4: comfy.tools has no gone"),
    ("import comfy.tools as t\nt.lost", "2: comfy.tools has no lost"),
    ("from comfy.tools import Kind\nKind.A, Kind.GONE", "2: comfy.tools.Kind has no GONE"),
    ("from comfy.front import Kind\nKind.GONE", "2: comfy.tools.Kind has no GONE"),
    ("from comfy.front import Kind, tools\nKind.A, Kind.instance, tools.make, tools.later, tools.looped", None),
    ("from comfy.tools import Child\nChild.anything", None),  # its base may have it
    ("from comfy.open import whatever\nfrom . import comfy_like", None),
    ("import folder_paths\nfolder_paths.gone", "2: folder_paths has no gone"),
])
def test_what_is_missing_is_one_line(tmp_path, code, line):
    comfyui, pack = tmp_path / "ComfyUI", tmp_path / "pack"
    (comfyui / "comfy").mkdir(parents=True)
    pack.mkdir()
    (comfyui / "folder_paths.py").write_text("base = 1\n")
    (comfyui / "comfy" / "tools.py").write_text(
        "try:\n    import fast\nexcept ImportError:\n    later = None\nelse:\n    later = 1\n"
        "for looped in ():\n    pass\n\n\n"
        "class Kind:\n    A = 1\n\n    def __init__(self):\n        Kind.instance = self\n\n\n"
        "class Child(fast.Base):\n    pass\n\n\n"
        "def make():\n    gone = 1\n"
    )
    (comfyui / "comfy" / "front.py").write_text("from . import tools\nfrom .tools import Kind\n")
    (comfyui / "comfy" / "open.py").write_text("from fast import *\n")
    (pack / "a.py").write_text(code)
    (pack / "b.py").write_text(code)  # said once
    expected = [f"a.py:{line}"] if line else []
    assert host_references.missing([pack / "a.py", pack / "b.py"], pack, comfyui) == expected
