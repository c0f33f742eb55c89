"""Label Media's certificate reaches the run of a command, which has a user folder of its own."""

import importlib.util
import os
import stat

import pytest
from launcher import certificates, scripts, source

PLACE = ("user", "__understudy")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A pack's folder without ComfyUI."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / "pack" / ".cache").mkdir(parents=True)
    return tmp_path / "pack"


def certify(root):
    folder = certificates.folder(root)
    folder.mkdir(parents=True)
    for name in certificates.FILES:
        (folder / name).write_text(name)
    (folder / "private_key.pem").chmod(0o600)
    (folder / "library.sqlite3").write_text("not theirs")
    return folder


def test_all_of_it_is_lent_and_nothing_else(root, tmp_path):
    assert certificates.lend(root, tmp_path / "before") is None and not (tmp_path / "before").exists()
    folder = certify(root)
    assert folder == root.joinpath(".cache", "serve", *PLACE)
    assert certificates.lend(root, tmp_path / "run") == folder
    lent = {path.name: path.read_text() for path in tmp_path.joinpath("run", *PLACE).iterdir()}
    assert lent == {name: name for name in certificates.FILES}
    key = tmp_path.joinpath("run", *PLACE, "private_key.pem")
    assert os.name == "nt" or stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_run_has_it_before_comfyui_starts_and_leaves_none(root, tmp_path, monkeypatch, capsys):
    folder, seen = certify(root), []
    spec = importlib.util.spec_from_file_location("run_command", scripts.ROOT / "workflows" / "run.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)

    def server(_comfyui, base, **_options):
        seen.extend(sorted(path.name for path in base.joinpath(*PLACE).iterdir()))
        raise source.SetupError("no further")

    monkeypatch.setattr(command, "ROOT", root)
    monkeypatch.setattr(command, "CACHE", root / ".cache")
    monkeypatch.setattr(command, "Server", server)
    with pytest.raises(source.SetupError, match="no further"):
        command.run(command.parse(["--output", str(tmp_path / "gallery")]), [], tmp_path / "comfyui")
    assert seen == sorted(certificates.FILES) and str(folder) in capsys.readouterr().out
    assert list((root / ".cache").glob("run-*")) == []
