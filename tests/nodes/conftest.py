"""ComfyUI's folders inside a temporary one, for tests that save and list weight files."""

import copy
from pathlib import Path

import folder_paths
import pytest


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    """ComfyUI's output folder, with separate lists of models, for one test."""
    folder = tmp_path / "output"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths)
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.delenv("UNDERSTUDY_THEATRE", raising=False)
    return folder
