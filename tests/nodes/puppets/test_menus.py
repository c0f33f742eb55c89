"""The switch that shows the theatre, and the lists in which its models are."""

import json
from pathlib import Path

import folder_paths
import pytest
from pack.nodes import extension
from pack.nodes.files.folders import WeightFolder
from pack.nodes.puppets import menus


@pytest.mark.parametrize(("variable", "setting", "enabled"), [
    (None, None, True), (None, True, True), (None, False, False), (None, "false", True),
    ("0", None, False), ("0", True, False), ("off", None, False), ("False", None, False),
    ("1", False, True), ("", False, False), (" ", None, True),
])
def test_the_theatre_s_switch(output, monkeypatch, variable, setting, enabled):
    if variable is not None:
        monkeypatch.setenv("UNDERSTUDY_THEATRE", variable)
    settings_file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_text(json.dumps({} if setting is None else {"Understudy.Theatre": setting}))
    assert menus.is_shown() is enabled


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_damaged_settings_leave_the_theatre_open(output, content):
    settings_file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_bytes(content)
    assert menus.is_shown()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_theatre_s_models_stand_only_in_the_lists_they_belong_to(tmp_path, output, monkeypatch, enabled):
    models = tmp_path / "models of the pack"
    shipped = {"checkpoints": menus.MODEL_FILES["checkpoints"][0], "loras": menus.MODEL_FILES["loras"][-1]}
    for key, name in shipped.items():
        (models / key).mkdir(parents=True)
        (models / key / name).touch()
    monkeypatch.setattr(menus, "MODELS", models)
    monkeypatch.setenv("UNDERSTUDY_THEATRE", str(int(enabled)))
    extension.register_folders()
    shown = [key for key in menus.MODEL_FILES if str(models / key) in folder_paths.get_folder_paths(key)]
    assert shown == (list(shipped) if enabled else [])
    assert all((name in WeightFolder(key).choices()) is enabled for key, name in shipped.items())
