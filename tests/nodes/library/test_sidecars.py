"""Pictures and notes beside a file, in the forms of model managers, and what must not be read."""

import json
import os
import zlib

import pytest
import torch
from pack.nodes.library import sidecars
from PIL import Image, PngImagePlugin


@pytest.fixture
def path(tmp_path):
    return tmp_path / "anna_00001_.safetensors"


def picture(path, colour, size=(20, 10), **options):
    Image.new("RGB", size, colour).save(path, **options)


@pytest.mark.parametrize("ending", [
    ".preview.png", ".preview.jpg", ".preview.jpeg", ".preview.webp", ".png", ".jpg", ".jpeg", ".webp",
])
def test_each_form_of_picture_is_found_and_comfyui_s_browser_finds_it_too(path, ending):
    from app.model_manager import ModelFileManager

    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    picture(path.with_suffix(ending), (255, 0, 0))
    image, problem = sidecars.preview(path)
    assert image.shape == (1, 10, 20, 3) and image.dtype == torch.float32 and not problem
    torch.testing.assert_close(image[0, 5, 5], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)
    assert ModelFileManager().get_model_previews(str(path)) == [str(path.with_suffix(ending))]


def test_a_preview_comes_before_other_pictures_and_large_ones_are_scaled(path):
    picture(path.with_suffix(".png"), (0, 255, 0))
    picture(path.with_suffix(".preview.jpg"), (0, 0, 255), (3000, 1500))
    image, _ = sidecars.preview(path)
    assert image.shape == (1, 512, 1024, 3) and image[0, 0, 0, 2] > 0.9
    assert sidecars.preview(path.with_name("ben.safetensors")) == (None, "there is no preview picture beside it")


def bomb(path):
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    picture(path, (0, 0, 0))
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


def huge_text(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "y" * (2 << 20), zip=True)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)


HOSTILE = {
    "text": lambda path: path.write_text("no picture"), "empty": lambda path: path.touch(), "bomb": bomb,
    "cut": lambda path: (picture(path, (1, 2, 3), (200, 200)), path.write_bytes(path.read_bytes()[:90])),
    "folder": lambda path: path.mkdir(), "pipe": lambda path: os.mkfifo(path), "huge text": huge_text,
    "dangling link": lambda path: path.symlink_to(path.parent / "nothing"),
    "gif": lambda path: Image.new("RGB", (4, 4)).save(path, "gif"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_picture_is_said_and_not_shown(path, kind):
    HOSTILE[kind](path.with_suffix(".png"))
    image, problem = sidecars.preview(path)
    assert image is None and problem.startswith("anna_00001_.png ") and problem.isprintable() and len(problem) < 200


def test_a_link_out_of_the_folder_is_not_followed(path, tmp_path):
    inside = tmp_path / "loras"
    inside.mkdir()
    picture(tmp_path / "private.png", (9, 9, 9))
    (tmp_path / "private.json").write_text('{"tags": ["secret"]}')
    (inside / "a.png").symlink_to(tmp_path / "private.png")
    (inside / "a.metadata.json").symlink_to(tmp_path / "private.json")
    assert sidecars.preview(inside / "a.safetensors")[0] is None
    assert sidecars.tags_and_author(inside / "a.safetensors") == ((), "")


@pytest.mark.parametrize(("ending", "content"), [
    (".metadata.json", {"tags": ["robot", "red"], "civitai": {"creator": {"username": "zoe"}}}),
    (".cm-info.json", {"ModelName": "x", "Tags": ["robot", "red"], "creator": {"username": "zoe"}}),
    (".civitai.info", {"model": {"tags": ["robot", "red"]}, "creator": {"username": "zoe"}}),
])
def test_tags_and_author_of_each_manager_are_read(path, ending, content):
    path.with_suffix(ending).write_text(json.dumps(content))
    assert sidecars.tags_and_author(path) == (("robot", "red"), "zoe")


@pytest.mark.parametrize("content", [
    "", "[]", "7", "{", "[" * 100_000, '{"tags": "robot"}', '{"tags": {"a": 1}}', '{"tags": [1, null, [], ""]}',
    '{"model": "x"}', '{"creator": {"username": 5}}', '{"civitai": 3}', "\ud800",
])
def test_hostile_notes_say_nothing(path, content):
    path.with_suffix(".metadata.json").write_bytes(content.encode(errors="surrogatepass"))
    assert sidecars.tags_and_author(path) == ((), "")


def test_long_notes_are_cut(path):
    tags = [f"\u202etag {i}\n" + "x" * 500 for i in range(500)]
    path.with_suffix(".metadata.json").write_text(json.dumps({"tags": tags}))
    read, _ = sidecars.tags_and_author(path)
    assert len(read) == 20 and all(tag.isprintable() and len(tag) < 100 for tag in read)
    path.with_suffix(".metadata.json").write_text(json.dumps({"tags": ["x"], "pad": "y" * (5 << 20)}))
    assert sidecars.tags_and_author(path) == ((), "")
