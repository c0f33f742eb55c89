"""The picture that a Save node writes beside its file: read by others, never in place of one."""

import errno

import pytest
import torch
from pack.nodes.training import previews
from PIL import Image


@pytest.fixture
def path(tmp_path):
    return tmp_path / "Åsa 同意_00001_.safetensors"


def save(path, preview):
    def write():
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
        return path

    assert previews.save_with("Save", write, preview) == path
    return path.with_name("Åsa 同意_00001_.preview.png")


def test_comfyui_finds_it_and_it_is_the_first_picture_without_metadata(path):
    from app.model_manager import ModelFileManager

    levels = torch.arange(2 * 5 * 7 * 3).reshape(2, 5, 7, 3)
    beside = save(path, torch.cat([levels / 255, torch.ones(2, 5, 7, 1)], dim=-1))
    assert ModelFileManager().get_model_previews(str(path)) == [str(beside)]
    with Image.open(beside) as picture:
        assert picture.mode == "RGB" and picture.size == (7, 5) and not picture.info
        assert picture.getpixel((6, 4)) == tuple(levels[0, 4, 6].tolist())


def test_a_large_one_is_scaled_and_none_writes_none(path):
    with Image.open(save(path, torch.full((1, 600, 1200, 1), 2.0))) as picture:
        assert picture.size == (512, 256) and picture.getpixel((0, 0)) == (255, 255, 255)
    assert not save(path.with_name("b.safetensors"), None).with_name("b.preview.png").exists()


def test_one_that_is_there_stays_and_the_node_says_so(path, caplog):
    path.with_suffix(".preview.png").write_bytes(b"mine")
    assert save(path, torch.zeros(1, 4, 4, 3)).read_bytes() == b"mine"
    assert "was there already, and stays" in caplog.text
    assert sorted(file.name for file in path.parent.iterdir()) == sorted((path.name, path.stem + ".preview.png"))


def test_a_full_disk_leaves_the_file_and_no_picture(path, caplog, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(previews, "publish_as", full)
    assert not save(path, torch.zeros(1, 4, 4, 3)).exists() and path.exists()
    assert "preview.png could not be written: No space left" in caplog.text


@pytest.mark.parametrize("wrong", [torch.zeros(0, 4, 4, 3), torch.zeros(4, 4), torch.full((1, 4, 4, 3), torch.nan)])
def test_what_is_no_picture_is_refused_before_anything_is_written(path, wrong):
    with pytest.raises(ValueError, match="preview"):
        save(path, wrong)
    assert not path.exists()
