"""Label Media and Read Label as ComfyUI calls them, and readers that share no code with them."""

import datetime
import io
import json
import struct
import zlib

import av
import c2pa
import make_certificate
import torch
from comfy_api.latest import InputImpl, Types
from comfy_api.latest import io as nodes_io
from pack.nodes.provenance.nodes import UnderstudyLabelMedia, UnderstudyReadLabel
from PIL import Image

COMPOSITE, TRAINED = "compositeWithTrainedAlgorithmicMedia", "trainedAlgorithmicMedia"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
WORKFLOW = {"nodes": [{"id": 1, "type": "木偶 <&>"}], "extra": {}}
TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}


def pictures(count=1, height=24, width=32, channels=3):
    return torch.rand((count, height, width, channels), generator=torch.Generator().manual_seed(7))


def video(frames=5):
    components = Types.VideoComponents(images=pictures(frames, 32, 32), audio=None, frame_rate=8)
    return InputImpl.VideoFromComponents(components)


def label(folders, prompt=None, label=COMPOSITE, sign=True, **inputs):
    """Run Label Media, node `label` of `prompt`; the paths that it says it saved."""
    hidden = {
        nodes_io.Hidden.prompt: {"label": {"class_type": "UnderstudyLabelMedia", "inputs": {}}, **(prompt or {})},
        nodes_io.Hidden.unique_id: "label", nodes_io.Hidden.extra_pnginfo: {"workflow": WORKFLOW},
    }
    node = UnderstudyLabelMedia.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    media = {} if {"images", "video"} & set(inputs) else {"images": pictures()}
    result = node.execute(filename_prefix="made/x", label=label, sign=sign, **media, **inputs)
    return [folders.output / each["subfolder"] / each["filename"] for each in result.ui.as_dict()["images"]]


def certify(base):
    """Put a certificate, as the command makes it, where the server in `base` looks for it."""
    folder = base / "user" / "__understudy"
    if not (folder / "certificate.pem").exists():
        make_certificate.write(make_certificate.make("Anna", 3, datetime.datetime.now(datetime.timezone.utc)), folder)


def read(name):
    """What Read Label says of a file: (claims, signature holds, picture matches)."""
    return UnderstudyReadLabel.execute(file=name).result


def manifests(path, anchors=""):
    """c2pa's own report, under its own default settings but for the anchors: (active manifest, whole report)."""
    trust = {"trust": {"trust_anchors": anchors}} if anchors else {}
    with c2pa.Context.from_dict(trust) as context, open(path, "rb") as file:
        with c2pa.Reader(TYPES[path.suffix[1:]], file, context=context) as reader:
            report = json.loads(reader.json())
    return report["manifests"][report["active_manifest"]], report


def answered_for(path):
    """The labels of the assertions that the signer answers for, and of those that are only gathered."""
    with c2pa.Context() as context, open(path, "rb") as file, c2pa.Reader(file, context=context) as reader:
        report = json.loads(reader.detailed_json())
    claim = report["manifests"][report["active_manifest"]]["claim"]
    return [
        {each["url"].rpartition("/")[2] for each in claim.get(kind) or []}
        for kind in ("created_assertions", "gathered_assertions")
    ]


def packet(path):
    """The XMP packet of a file, by the layout of its format."""
    content = path.read_bytes()
    if path.suffix == ".png":
        for kind, body in png_chunks(content):
            if kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
                return body.split(b"\0", 5)[5]
    elif path.suffix == ".jpg":
        start = content.index(b"http://ns.adobe.com/xap/1.0/\0")
        (size,) = struct.unpack(">H", content[start - 2:start])
        return content[start + 29:start - 2 + size]
    elif path.suffix == ".webp":
        return dict(riff_chunks(content))[b"XMP "]
    else:
        for kind, body in boxes(content):
            if kind == b"uuid" and body[:16] == bytes.fromhex("be7acfcb97a942e89c71999491e3afac"):
                return body[16:]
    return None


def png_chunks(content):
    place = 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place:place + 4])
        kind, body = content[place + 4:place + 8], content[place + 8:place + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack(">I", content[place + 8 + size:place + 12 + size])[0]
        yield kind, body
        place += 12 + size


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def riff_chunks(content):
    place = 12
    while place < len(content):
        kind, size = struct.unpack("<4sI", content[place:place + 8])
        yield kind, content[place + 8:place + 8 + size]
        place += 8 + size + size % 2


def boxes(content):
    """The boxes at an MP4 file's top level, which must fill it exactly."""
    place = 0
    while place < len(content):
        size, kind = struct.unpack(">I4s", content[place:place + 8])
        yield kind, content[place + 8:place + size]
        place += size
    assert place == len(content)


def container_metadata(path):
    with av.open(io.BytesIO(path.read_bytes())) as container:
        return dict(container.metadata), sum(1 for _ in container.decode(video=0))


def sign_elsewhere(content, path, parent=None, remote="", title=None, mining=""):
    """A file signed by another program, by a signer whom nobody vouches for."""
    made = make_certificate.make("Editor", 3, datetime.datetime.now(datetime.timezone.utc))
    action = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["parent"]}} if parent else {
        "action": "c2pa.created", "digitalSourceType": SOURCE_TYPES + TRAINED,
    }
    definition = {
        "claim_generator_info": [{"name": "Editor"}], "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    if mining:
        entry = {"c2pa.ai_generative_training": {"use": mining}}
        definition["assertions"].append({"label": "c2pa.training-mining", "data": {"entries": entry}})
    info = c2pa.C2paSignerInfo("es256", made["certificate.pem"], made["private_key.pem"], None)
    with c2pa.Signer.from_info(info) as signer, c2pa.Builder(definition) as builder:
        if parent:
            with open(parent, "rb") as file:
                builder.add_ingredient({"label": "parent", "relationship": "parentOf"}, "image/png", file)
        if remote:
            builder.set_no_embed()
            builder.set_remote_url(remote)
        out = io.BytesIO()
        builder.sign(signer, "image/png", io.BytesIO(content), out)
    path.write_bytes(out.getvalue())


def red_png():
    """The bytes of a small picture that claims nothing."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "PNG")
    return out.getvalue()
