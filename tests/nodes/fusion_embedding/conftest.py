"""ComfyUI's folders in a temporary one, for what writes fusions and checkpoints."""

import copy

import folder_paths
import pytest
from pack.nodes import extension


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The output folder; models lie in `models` below it."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", copy.deepcopy(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    extension.register_folders()
    return tmp_path
