"""What Label Media writes, read back by Pillow, PyAV, c2pa under its own settings, and exiftool where it is there."""

import json
import shutil
import subprocess
from xml.dom import minidom

import numpy as np
import pytest
import torch
from comfy.cli_args import args
from PIL import Image
from support import labels
from support.labels import COMPOSITE, SOURCE_TYPES, TRAINED

FORMATS = ("png", "jpeg", "webp")
EVERY = pytest.mark.parametrize("kind", [*FORMATS, "mp4"])


def save(folders, kind, **inputs):
    media = {"video": labels.video()} if kind == "mp4" else {"format": kind}
    (path,) = labels.label(folders, **media, **inputs)
    return path


def source_type(path):
    """The property as an XML parser other than the node's sees it."""
    (description,) = minidom.parseString(labels.packet(path)).getElementsByTagName("rdf:Description")
    return description.getAttributeNS("http://iptc.org/std/Iptc4xmpExt/2008-02-29/", "DigitalSourceType")


@pytest.mark.parametrize("label", [COMPOSITE, TRAINED])
@EVERY
def test_metadata_names_the_label_signed_or_not(folders, certificate, kind, label):
    signed, unsigned = (save(folders, kind, label=label, sign=sign) for sign in (True, False))
    assert source_type(signed) == source_type(unsigned) == SOURCE_TYPES + label
    assert labels.packet(signed) == labels.packet(unsigned)
    assert labels.manifests(signed)[1]["validation_state"] == "Valid"
    with pytest.raises(labels.c2pa.C2paError.ManifestNotFound):
        labels.manifests(unsigned)


@EVERY
def test_exiftool_reads_the_label_too(folders, certificate, kind):
    if not shutil.which("exiftool"):
        pytest.skip("no exiftool here; Debian's package is `libimage-exiftool-perl`")
    run = subprocess.run(
        ["exiftool", "-json", "-G1", "-XMP:all", str(save(folders, kind))], capture_output=True, text=True, check=True
    )
    read = json.loads(run.stdout)[0]
    assert read["XMP-iptcExt:DigitalSourceType"] == SOURCE_TYPES + COMPOSITE
    assert read["XMP-xmp:CreatorTool"] == "Understudy for ComfyUI"


@pytest.mark.parametrize("sign", [True, False])
def test_a_png_holds_the_chunks_of_save_image(folders, certificate, sign, monkeypatch):
    """The same texts in the same order, before the pixels, and the pixels of Save Image."""
    import nodes as comfy_nodes

    prompt = {"1": {"class_type": "EmptyImage", "inputs": {"text": "人 <&>"}}}
    (path,) = labels.label(folders, prompt=prompt, sign=sign)
    full = {"label": {"class_type": "UnderstudyLabelMedia", "inputs": {}}, **prompt}
    saver = comfy_nodes.SaveImage()
    saver.output_dir = str(folders.output)
    saver.save_images(labels.pictures(), "plain", full, {"workflow": labels.WORKFLOW})
    ours, theirs = (
        [chunk for chunk in labels.png_chunks(each.read_bytes()) if chunk[0] in (b"tEXt", b"iTXt")]
        for each in (path, folders.output / "plain_00001_.png")
    )
    assert [chunk for chunk in ours if not chunk[1].startswith(b"XML:")] == theirs and len(theirs) == 2
    kinds = [kind for kind, _ in labels.png_chunks(path.read_bytes())]
    assert kinds.index(b"IDAT") > max(i for i, kind in enumerate(kinds) if kind in (b"tEXt", b"iTXt"))
    pixels = [np.asarray(Image.open(each)) for each in (path, folders.output / "plain_00001_.png")]
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_exif_holds_the_workflow_as_comfyui_writes_it(folders, certificate, kind):
    with Image.open(save(folders, kind)) as image:
        exif = image.getexif()
    assert json.loads(exif[0x010F].removeprefix("workflow:")) == labels.WORKFLOW
    assert "label" in json.loads(exif[0x0110].removeprefix("prompt:"))


@pytest.mark.parametrize("sign", [True, False])
def test_a_video_holds_the_metadata_of_save_video_and_plays(folders, certificate, sign):
    path = save(folders, "mp4", sign=sign)
    metadata, frames = labels.container_metadata(path)
    plain = folders.output / "plain.mp4"
    prompt = {"label": {"class_type": "UnderstudyLabelMedia", "inputs": {}}}
    labels.video().save_to(str(plain), metadata={"workflow": labels.WORKFLOW, "prompt": prompt})
    assert metadata == labels.container_metadata(plain)[0] and frames == 5
    kinds = [kind for kind, _ in labels.boxes(path.read_bytes())]
    assert kinds.count(b"uuid") == 1 + sign and kinds.index(b"moov") < kinds.index(b"mdat")


def test_without_metadata_only_the_label_is_written(folders, certificate, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    prompt = {
        "1": {"class_type": "UnderstudyPuppet", "inputs": {"identity": "secret"}},
        "label": {"class_type": "UnderstudyLabelMedia", "inputs": {"images": ["1", 0]}},
    }
    (path,) = labels.label(folders, prompt=prompt)
    assert source_type(path) == SOURCE_TYPES + COMPOSITE
    assert b"secret" not in path.read_bytes() and b"workflow" not in path.read_bytes()


def test_every_picture_of_a_batch_is_signed_for_itself(folders, certificate):
    paths = labels.label(folders, images=labels.pictures(3))
    assert [path.name for path in paths] == [f"x_{n:05}_.png" for n in (1, 2, 3)]
    identities = {labels.manifests(path)[0]["label"] for path in paths}
    assert len(identities) == 3


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", FORMATS)
def test_grey_and_transparent_pictures(folders, certificate, kind, channels):
    images = labels.pictures(channels=channels)
    (path,) = labels.label(folders, images=images, format=kind)
    with Image.open(path) as image:
        assert image.size == (32, 24)
        if kind == "png":
            shown = np.asarray(image).reshape(24, 32, channels)
            assert (shown == (images[0] * 255).byte().numpy()).all()
        assert image.mode == {"png": {1: "L", 3: "RGB", 4: "RGBA"}, "webp": {1: "RGB", 3: "RGB", 4: "RGBA"}}.get(
            kind, {}
        ).get(channels, "RGB")


@pytest.mark.parametrize(("inputs", "message"), [
    ({"images": None, "video": None}, "neither images nor video is connected"),
    ({"images": labels.pictures(), "video": labels.video()}, "both connected"),
    ({"images": torch.full((1, 4, 4, 3), torch.nan)}, "images holds NaN"),
    ({"images": torch.zeros(1, 4, 4, 2)}, "images has shape"),
    ({"images": torch.zeros(0, 4, 4, 3)}, "images has shape"),
    ({"label": "digitalCapture"}, "label is 'digitalCapture'"),
    ({"format": "gif"}, "format is 'gif'"),
    ({"sources": "none.png"}, "sources has 'none.png'"),
    ({"sources": "../../x.png"}, "sources has"),
    ({"sources": "a\0.png"}, "sources has"),
])
def test_wrong_inputs_are_refused_by_name(folders, inputs, message):
    with pytest.raises(ValueError, match=message):
        labels.label(folders, **{"images": labels.pictures(), **inputs})
    assert list(folders.output.rglob("*.*")) == []


def test_a_workflow_that_no_jpeg_holds_is_refused(folders):
    prompt = {"1": {"class_type": "Note", "inputs": {"text": "x" * 70_000}}}
    with pytest.raises(ValueError, match="the workflow has 70.* bytes, over .* use png or webp"):
        labels.label(folders, prompt=prompt, format="jpeg")
    (path,) = labels.label(folders, prompt=prompt, format="webp")
    assert source_type(path) == SOURCE_TYPES + COMPOSITE
