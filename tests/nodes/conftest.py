"""ComfyUI's folders inside a temporary one, for tests that save and list weight files, and the theatre's model."""

import copy
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch
from pack.nodes.puppets import theatre


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


@pytest.fixture(scope="module")
def loaded(pack_root):
    """MODEL, CLIP and VAE of the theatre, as ComfyUI loads them."""
    theatre.register()
    with torch.inference_mode():
        path = pack_root / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
        return comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]
