"""Pairs of lists and folders: counts, kinds of pictures, damaged ones, and that a folder is read as it goes."""

import os
import shutil
import unicodedata
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from pack.nodes.fusion_embedding import pairs, training
from pack.nodes.fusion_embedding.method import FusionError
from pack.nodes.fusion_embedding.pairs import ROLES, FolderPairs, ListedPairs
from PIL import Image
from support import fusions


def listed(**changed):
    batches = {role: [tensor] for role, tensor in fusions.pair_lists(3).items()} | changed
    return ListedPairs(*(batches[role] for role in ROLES))


def test_batches_lists_and_one_source_for_all():
    lists = fusions.pair_lists(3)
    batch = listed()
    mixed = listed(target=[lists["target"][:2], lists["target"][2:]], source=list(lists["source"].split(1)))
    assert len(batch) == len(mixed) == 3 and batch.digest() == mixed.digest()
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(batch[i], mixed[i], strict=True))
    one = listed(source=[lists["source"][:1]])
    assert len(one) == 3 and torch.equal(one[2].source, one[0].source)
    assert one.digest() != batch.digest()


@pytest.mark.parametrize("counts", [(2, 3, 3), (3, 2, 3), (3, 3, 2), (2, 3, 4), (3, 1, 3), (3, 3, 1), (3, 1, 1)])
def test_unequal_counts_are_refused_with_the_numbers(counts):
    batches = {role: [fusions.poses(count)] for role, count in zip(ROLES, counts, strict=True)}
    with pytest.raises(FusionError, match=f"source {counts[0]}, pose {counts[1]}, target {counts[2]}"):
        ListedPairs(*batches.values())


def test_alpha_is_dropped_grey_repeated_and_sizes_may_differ():
    grey, alpha = fusions.pictures(3, channels=1), fusions.pictures(3, channels=4)
    actual = listed(source=[grey], target=[alpha[:2], fusions.pictures(1, 40, 24)])
    assert actual[0].source.shape == actual[0].target.shape == (1, 64, 64, 3)
    assert torch.equal(actual[1].source[..., 0], actual[1].source[..., 2])
    assert torch.equal(actual[1].target, alpha[1:2, ..., :3])
    assert (actual.size(0), actual.size(2)) == ((64, 64), (40, 24))


def test_lists_are_used_where_they_lie():
    """A data set that just fits into memory must not be copied."""
    lists = fusions.pair_lists(3)
    actual = listed(**{role: [tensor] for role, tensor in lists.items()})
    for role, views in zip(ROLES, actual.pictures, strict=True):
        assert views[1].untyped_storage().data_ptr() == lists[role].untyped_storage().data_ptr()


@pytest.mark.parametrize(("changed", "words"), [
    ({"pose": [torch.zeros(3, 64, 64, 3)]}, "pose 1 shows no person"),
    ({"pose": [fusions.poses(3)[..., :1]]}, "pose 1 is grey"),
    ({"target": [torch.full((3, 64, 64, 3), float("nan"))]}, "target holds NaN"),
    ({"target": [torch.zeros(3, 64, 64)]}, "target has shape"),
    ({"source": []}, "source holds no picture"),
])
def test_bad_pictures_are_refused_by_name(changed, words):
    with pytest.raises(FusionError, match=words):
        listed(**changed)[0]


def folder(path: Path, lists=None, names=("a", "b", "c"), ending="png") -> Path:
    for role, pictures in (lists or fusions.pair_lists(3)).items():
        (path / role).mkdir(parents=True)
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(path / role / f"{name}.{ending}")
    return path


def test_the_sizes_of_pairs_are_looked_up_once(tmp_path, monkeypatch):
    actual, asked = FolderPairs(folder(tmp_path)), []
    monkeypatch.setattr(actual, "size", lambda index: asked.append(index) or (64, 48))
    encoded = training.PairEncoder(actual, None, None, None, None, 8)
    assert encoded.sizes() == encoded.sizes() == [(8, 6)] * 3 and asked == [0, 1, 2]


def test_a_folder_is_its_pictures(tmp_path):
    lists = fusions.pair_lists(3)
    actual, expected = FolderPairs(folder(tmp_path, lists)), listed()
    assert len(actual) == 3 and actual.size(1) == (64, 64)
    for i in range(3):
        for ours, theirs in zip(actual[i], expected[i], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_folder_of_masks_greys_targets_and_is_read_as_it_goes(tmp_path):
    found = FolderPairs(folder(tmp_path / "set"))
    assert found.masks() is None
    (tmp_path / "set" / "mask").mkdir()
    half = np.zeros((64, 64), np.uint8)
    half[:32] = 255
    for name in "ab":
        Image.fromarray(half).save(tmp_path / "set" / "mask" / f"{name}.png")
    with pytest.raises(FusionError, match="has no 'c': give each pair a mask"):
        found.masks()
    Image.fromarray(half).save(tmp_path / "set" / "mask" / "c.png")
    masks = found.masks()
    masked = pairs.MaskedPairs(found, masks, 0.0)
    assert masks[0].shape == (1, 64, 64, 1) and len(masked) == 3
    assert torch.equal(masked[1].target[:, :32], found[1].target[:, :32]) and masked[1].target[:, 32:].unique() == 0.5
    assert torch.equal(masked[1].source, found[1].source) and masked.size(0) == found.size(0)
    digests = {masked.digest(), found.digest(), pairs.MaskedPairs(found, masks, 0.5).digest()}
    assert len(digests) == 3


def test_a_folder_is_read_as_it_goes(tmp_path, monkeypatch):
    """Three of three hundred pairs are wanted: three are read."""
    names = [f"{i:05}" for i in range(300)]
    folder(tmp_path, {role: tensor[:1].expand(300, -1, -1, -1) for role, tensor in fusions.pair_lists(1, 24).items()},
           names)
    read = []
    monkeypatch.setattr(pairs, "_read", lambda path, original=pairs._read: read.append(path) or original(path))
    actual = FolderPairs(tmp_path)
    assert len(actual) == 300 and actual.digest() and actual.size(7) == (24, 24) and not read
    for i in (250, 3, 77):
        assert actual[i].target.shape == (1, 24, 24, 3)
    assert [path.stem for path in read[::3]] == ["00250", "00003", "00077"] and len(read) == 9


def test_repainted_pictures_of_equal_size_under_the_same_names_are_other_data(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    for role in ROLES:
        (tmp_path / role).mkdir()
        Image.fromarray(pixels).save(tmp_path / role / "a.bmp")
    before, path = FolderPairs(tmp_path).digest(), tmp_path / "target" / "a.bmp"
    times = path.stat()
    Image.fromarray(pixels + 9).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    repainted = FolderPairs(tmp_path).digest()
    assert repainted != before
    Image.fromarray(pixels).save(path)
    assert FolderPairs(tmp_path).digest() == before, "the same pictures, written again"
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert FolderPairs(tmp_path / "copy").digest() == before, "and copied"


def test_names_in_two_spellings_of_unicode_are_one_name(tmp_path):
    composed, decomposed = "Zoë", unicodedata.normalize("NFD", "Zoë")
    path = folder(tmp_path, names=("a", composed, "z"))
    (path / "pose" / f"{composed}.png").rename(path / "pose" / f"{decomposed}.png")
    found = FolderPairs(path)
    assert len(found) == 3 and [file.parent.name for file in found.files[1]] == list(ROLES)
    Image.new("RGB", (8, 8)).save(path / "pose" / f"{composed}.png")
    if len(list((path / "pose").iterdir())) == 4:  # some file systems see one name there
        with pytest.raises(FusionError, match="of one name"):
            FolderPairs(path)


def test_what_a_folder_lacks_is_named(tmp_path):
    with pytest.raises(FusionError, match="source cannot be read"):
        FolderPairs(tmp_path)
    path = folder(tmp_path / "set")
    (path / "pose" / "b.png").unlink()
    with pytest.raises(FusionError, match=r"'b' in \S+: not in all of source, pose, target"):
        FolderPairs(path)
    (path / "pose" / "b.png").write_bytes(b"no picture")
    with pytest.raises(FusionError, match="b.png is not a readable picture"):
        FolderPairs(path)[1]
    whole = (path / "target" / "c.png").read_bytes()
    (path / "target" / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FusionError, match="c.png is damaged"):
        FolderPairs(path)[2]
    with Image.open(path / "pose" / "a.png") as coloured:
        coloured.convert("L").save(path / "pose" / "a.png")
    with pytest.raises(FusionError, match="a.png is grey"):
        FolderPairs(path)[0]
    Image.new("RGB", (8, 8)).save(path / "pose" / "a.png")
    with pytest.raises(FusionError, match="a.png shows no person"):
        FolderPairs(path)[0]
    Image.new("RGB", (8, 8)).save(path / "source" / "._a.png")
    assert len(FolderPairs(path)) == 3, "a leftover of another system is not a picture"
    Image.new("RGB", (8, 8)).save(path / "source" / "a.jpg")
    with pytest.raises(FusionError, match="a.jpg and a.png, of one name"):
        FolderPairs(path)
    (path / "source" / "a.jpg").unlink()
    for file in (path / "target").iterdir():
        file.unlink()
    with pytest.raises(FusionError, match="target has no picture"):
        FolderPairs(path)


def exif(path, header=b"II*\0"):
    """A picture that says that the camera lay on its side, in the words of another header."""
    image = Image.new("RGB", (30, 10))
    said = image.getexif()
    said[0x0112] = 6
    image.save(path, exif=said.tobytes().replace(b"II*\0", header).replace(b"MM\0*", header))


def giant(path):
    Image.new("RGB", (4, 4)).save(path, "bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    path.write_bytes(content)


def short_header(path):
    Image.new("RGB", (4, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[8:12] = (5).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [giant, short_header, lambda path: exif(path, b"who?")])
def test_whatever_pil_says_of_a_file_names_the_file(tmp_path, spoil):
    actual = FolderPairs(folder(tmp_path))
    spoil(tmp_path / "target" / "b.png")
    for ask in (actual.size, actual.__getitem__):
        with pytest.raises(FusionError, match="b.png is .*: replace or remove the pair"):
            ask(1)


def test_grey_in_16_bits_keeps_its_shades(tmp_path):
    actual = FolderPairs(folder(tmp_path))
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "source" / "a.png")
    expected = torch.from_numpy(ramp / 65535).float()[None, ..., None].expand(-1, -1, -1, 3)
    torch.testing.assert_close(actual[0].source, expected, rtol=0, atol=0.5 / 255 + 1e-4)


def test_a_camera_that_lay_on_its_side_is_known_before_reading(tmp_path):
    path = folder(tmp_path)
    image = Image.fromarray(np.zeros((10, 30, 3), np.uint8) + 9)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path / "target" / "a.png", exif=exif)
    actual = FolderPairs(path)
    assert actual.size(0) == tuple(actual[0].target.shape[1:3]) == (30, 10)


def test_the_folder_is_one_of_the_input_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    folder(tmp_path / "people" / "set one")
    (tmp_path / "other" / "source").mkdir(parents=True)
    assert pairs.choices() == ["none", "people/set one"]
    assert len(pairs.open_pairs({}, "people/set one")) == 3
    with pytest.raises(FusionError, match="leaves the input folder"):
        pairs.open_pairs({}, "../elsewhere")
    with pytest.raises(FusionError, match="source, pose, target: nothing is connected"):
        pairs.open_pairs({"source": None}, "none")
