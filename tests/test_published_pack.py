"""The files of the published pack: those that `.comfyignore` leaves, as the registry's own tool packs them."""

import subprocess
import zipfile
from pathlib import PurePosixPath

from comfy_cli import file_utils
from launcher.scripts import ROOT
from support.shipped import all_files, shipped_files

TOP_LEVEL = {
    ".comfyignore", "CONTRIBUTING.md", "LICENSE", "README.md", "__init__.py", "kernels", "locales", "nodes",
    "pyproject.toml", "requirements.txt", "subgraphs", "web", "workflows",
}
# The rooms in `nodes` and the folders of translated help come and go with the nodes; the rest stays.
FOLDERS = {
    ".", "kernels", "locales/en", "locales/ja", "locales/zh", "subgraphs", "web", "workflows", "workflows/models",
    "workflows/models/action_identifiers", "workflows/models/checkpoints", "workflows/models/clip_vision",
    "workflows/models/diffusion_models", "workflows/models/fusion_embeddings", "workflows/models/loras",
    "workflows/models/vae",
}
LEFT_OUT = (
    ".ci/", "tests/", "workflows/launcher/", "workflows/theatre/", "workflows/trainer/", "workflows/run.py",
    "workflows/train.py", "workflows/make_certificate.py",
)


def test_its_top_level_and_folders():
    assert {name.split("/")[0] for name in shipped_files()} == TOP_LEVEL
    folders = {PurePosixPath(name).parent.as_posix() for name in shipped_files()}
    assert {folder for folder in folders if not folder.startswith(("nodes", "web/docs"))} == FOLDERS


def test_templates_with_their_pictures_weights_and_their_sources_are_in():
    shipped = set(shipped_files())
    weights = {name for name in all_files() if name.startswith("workflows/") and name.endswith(".safetensors")}
    templates = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "workflows").glob("*.json")}
    assert len(weights) >= 8 and len(templates) >= 10
    assert {name for name in shipped if PurePosixPath(name).parent.name == "workflows"} == {
        "workflows/README.md", "workflows/cover.webp",
        *(path.with_suffix(suffix).as_posix() for path in templates for suffix in (".json", ".jpg")),
    }
    assert {PurePosixPath(name).name for name in shipped if name.startswith("workflows/models/")} == {
        "SOURCES.md", *(PurePosixPath(name).name for name in weights)
    }


def test_tests_launcher_and_training_are_out():
    assert [prefix for prefix in LEFT_OUT if not any(name.startswith(prefix) for name in all_files())] == []
    assert [name for name in shipped_files() if name.startswith(LEFT_OUT)] == []


def test_everything_below_the_nodes_is_in():
    rooms = {name for name in all_files() if name.startswith(("nodes/", "kernels/", "web/", "locales/"))}
    assert rooms <= set(shipped_files())


def test_the_registry_s_tool_packs_the_same(tmp_path, monkeypatch):
    """comfy-cli packs what git tracks; a file that is not added yet is in neither list."""
    monkeypatch.chdir(ROOT)
    file_utils.zip_files(tmp_path / "pack.zip")
    command = ["git", "ls-files", "-z"]
    tracked = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0"))
    with zipfile.ZipFile(tmp_path / "pack.zip") as archive:
        assert set(archive.namelist()) == tracked & set(shipped_files())
