"""Both nodes in a real headless ComfyUI, and the workflow of a labelled file in its real window."""

import json
import urllib.error
import urllib.request

import pytest
from PIL import Image
from support import labels


@pytest.fixture(scope="module")
def signing_server(server):
    """The server, with a certificate as the command makes it, and a picture to load."""
    labels.certify(server.base)
    Image.effect_noise((64, 48), 60).convert("RGB").save(server.base / "input" / "noise.png")
    return server


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def prompt(kind, **settings):
    """Load a picture, scale it, and label it as a picture or a video."""
    inputs = {"filename_prefix": "labels/x", "label": labels.COMPOSITE, "sign": True, **settings}
    media = {"video": ["video", 0]} if kind == "mp4" else {"images": ["scale", 0], "format": kind}
    return {
        "load": node("LoadImage", image="noise.png"),
        "scale": node("ImageScale", image=["load", 0], width=32, height=32, upscale_method="area", crop="disabled"),
        "video": node("CreateVideo", images=["scale", 0], fps=8),
        "consent": node(
            "UnderstudyConsentRecord", subject="Åsa", scopes={"__value__": ["private"]}, granted_by="", granted_on="",
            expires="", note="",
        ),
        "label": node("UnderstudyLabelMedia", consent=["consent", 0], **inputs, **media),
    }


def done(entry):
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return entry["outputs"]


@pytest.fixture(params=["png", "jpeg", "webp", "mp4"])
def labelled(request, signing_server):
    """A file that the server labelled, by its path."""
    (saved,) = done(signing_server.queue(prompt(request.param)))["label"]["images"]
    return signing_server.base / "output" / saved["subfolder"] / saved["filename"]


def test_a_labelled_file_is_signed_names_its_source_and_is_read_back(signing_server, labelled):
    active, report = labels.manifests(labelled)
    assert report["validation_state"] == "Valid"
    assert [each["title"] for each in active["ingredients"]] == ["noise.png"]
    name = f"labels/{labelled.name} [output]"
    read = {
        "read": node("UnderstudyReadLabel", file=name),
        **{f"show {slot}": node("PreviewAny", source=["read", slot]) for slot in (0, 1, 2)},
    }
    outputs = done(signing_server.queue(read))
    claims = outputs["read"]["text"][0]
    assert claims.startswith(f"Label: {labels.COMPOSITE}") and "From: noise.png" in claims
    assert 'Consent: {"scopes": ["private"], "subject": "Åsa"}' in claims
    assert outputs["show 0"]["text"] == [claims]
    assert [outputs[f"show {slot}"]["text"][0].lower() for slot in (1, 2)] == ["true", "true"]


def test_the_server_never_serves_the_key(signing_server):
    names = ("userdata/../__understudy/private_key.pem", "userdata/__understudy%2Fprivate_key.pem",
             "userdata/..%2F__understudy%2Fprivate_key.pem")
    for path in (*names, *(f"api/{name}" for name in names)):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{signing_server.url}/{path}")


def test_both_media_or_none_are_an_error_on_the_node(signing_server):
    for extra in ({"video": ["video", 0]}, {}):
        wrong = prompt("png")
        wrong["label"]["inputs"] |= extra
        if not extra:
            del wrong["label"]["inputs"]["images"]
        entry = signing_server.queue(wrong)
        assert entry["status"]["status_str"] == "error"
        assert "connect one of them" in json.dumps(entry["status"]["messages"])
