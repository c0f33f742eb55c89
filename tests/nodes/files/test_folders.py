"""Folders of weight files: what ComfyUI lists in the ones that rooms declare."""

import folder_paths
import pytest
import safetensors.torch
import torch
from pack.nodes import extension
from pack.nodes.files import names, weights

WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4)}


@pytest.mark.parametrize("listed_folder", [extension.ACTION_IDENTIFIERS, extension.FUSION_EMBEDDINGS])
def test_own_folders_list_safetensors_of_models_and_output(tmp_path, output, listed_folder, monkeypatch):
    key = listed_folder.name
    monkeypatch.setenv("UNDERSTUDY_THEATRE", "0")
    # As from extra_model_paths.yaml: the key is there already, and its empty set would list every file.
    folder_paths.add_model_folder_path(key, str(tmp_path / "shelf"))
    extension.register_folders()
    extension.register_folders()
    for folder in (tmp_path / "shelf", tmp_path / "models" / key):
        folder.mkdir(parents=True)
        safetensors.torch.save_file(WEIGHTS, folder / f"{folder.parent.name}.safetensors")
        (folder / "notes.txt").touch()
    saved = weights.save(WEIGHTS, {}, key, "anna")
    listed = listed_folder.choices()
    assert len(listed) == 3 and saved.name in listed and all(name.endswith(".safetensors") for name in listed)
    assert len(folder_paths.get_folder_paths(key)) == 3


def test_a_file_that_is_gone_is_named_with_its_places(output):
    extension.register_folders()
    with pytest.raises(names.WeightFileError, match=r"'anna\.safetensors'.*action_identifiers"):
        extension.ACTION_IDENTIFIERS.find("anna.safetensors")
    with pytest.raises(names.WeightFileError):
        extension.ACTION_IDENTIFIERS.find("../../../../etc/passwd")
