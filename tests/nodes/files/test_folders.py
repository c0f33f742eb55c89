"""Folders of weight files: what ComfyUI lists in the ones that rooms declare."""

import os

import folder_paths
import pytest
import safetensors.torch
import torch
from pack.nodes import extension
from pack.nodes.files import names, weights
from pack.nodes.identity_prior import files as identity_prior_files
from pack.nodes.video_identity import files as video_identity_files

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


def test_of_the_loras_each_loader_lists_its_kind_alone(output):
    """Else the first of the list, which the node preselects, is somebody's style LoRA."""
    loras = output / "loras"
    loras.mkdir(exist_ok=True)
    folder_paths.add_model_folder_path("loras", str(loras))
    adapter = {"blocks.0.self_attn.q_loras.down.weight": torch.ones(2, 4)}
    safetensors.torch.save_file(adapter, loras / "face.safetensors")
    torch.save(adapter, loras / "face.ckpt")
    torch.save({"state_dict": adapter}, loras / "official.ckpt")
    torch.save(adapter, loras / "old.ckpt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(WEIGHTS, loras / "bear.safetensors", {"understudy_identity": "{}"})
    style = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4)}
    safetensors.torch.save_file(style, loras / "a.safetensors")
    torch.save(WEIGHTS, loras / "b.ckpt")
    (loras / "c.safetensors").touch()
    os.symlink(loras / "gone", loras / "d.safetensors")
    folder_paths.filename_list_cache.clear()
    ours = {"face.safetensors", "face.ckpt", "official.ckpt", "old.ckpt", "bear.safetensors"}
    prior, adapters = (
        {name for name in files.FOLDER.choices() if name in ours or name[0] in "abcd" and name[1] == "."}
        for files in (identity_prior_files, video_identity_files)
    )
    assert prior == {"bear.safetensors"} and adapters == ours - prior
    safetensors.torch.save_file(WEIGHTS, loras / "face.safetensors")
    assert "face.safetensors" not in video_identity_files.FOLDER.choices(), "a file that changed is looked at again"


def test_a_file_that_is_gone_is_named_with_its_places(output):
    extension.register_folders()
    with pytest.raises(names.WeightFileError, match=r"'anna\.safetensors'.*action_identifiers"):
        extension.ACTION_IDENTIFIERS.find("anna.safetensors")
    with pytest.raises(names.WeightFileError):
        extension.ACTION_IDENTIFIERS.find("../../../../etc/passwd")


def test_a_load_node_runs_again_where_the_content_changed_and_nothing_else_tells_it(output):
    extension.register_folders()
    path = weights.save(WEIGHTS, {}, extension.ACTION_IDENTIFIERS.name, "anna")
    before, times = extension.ACTION_IDENTIFIERS.fingerprint(path.name), path.stat()
    os.utime(path, (1, 1))
    assert extension.ACTION_IDENTIFIERS.fingerprint(path.name) == before
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert extension.ACTION_IDENTIFIERS.fingerprint(path.name) != before
