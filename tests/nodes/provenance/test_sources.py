"""What a result was made from: files that the graph loads or that are named, their manifests, and learned files."""

import hashlib

import folder_paths
import pytest
import torch
from pack.nodes.files import weights
from pack.nodes.provenance import nodes
from PIL import Image
from support import labels
from support.labels import COMPOSITE, TRAINED


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(nodes, "tell", lambda _node, some, *_level: lines.extend(some))
    return lines


def graph(**texts):
    """A graph in which Load Image nodes are a method's source, driving picture and so on."""
    prompt = {name: {"class_type": "LoadImage", "inputs": {"image": text}} for name, text in texts.items()}
    prompt["method"] = {
        "class_type": "UnderstudyFrequencyGuidanceSampler", "inputs": {"phase_high": 0.25, "seed": 2**64 - 1} | {
            name: [name, 0] for name in texts
        },
    }
    prompt["label"] = {"class_type": "UnderstudyLabelMedia", "inputs": {"images": ["method", 0]}}
    return prompt


def ingredients(path):
    active, report = labels.manifests(path)
    assert report["validation_state"] == "Valid"
    return {each["title"]: each for each in active.get("ingredients", [])}


def actions(path):
    active = labels.manifests(path)[0]
    (assertion,) = [each for each in active["assertions"] if each["label"].startswith("c2pa.actions")]
    return assertion["data"]["actions"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_loaded_files_are_ingredients_by_use_and_sha256(folders, certificate):
    (folders.input / "anna.png").write_bytes(labels.red_png())
    Image.new("RGB", (8, 8)).save(folders.output / "dance.jpg")
    (path,) = labels.label(folders, prompt=graph(source="anna.png", driving="dance.jpg [output]"))
    found = ingredients(path)
    assert set(found) == {"anna.png", "dance.jpg"}
    assert {each["relationship"] for each in found.values()} == {"inputTo"}
    assert found["anna.png"]["description"] == (
        f"source of UnderstudyFrequencyGuidanceSampler; SHA-256 {sha256(folders.input / 'anna.png')}"
    )
    assert found["dance.jpg"]["description"].startswith("driving of UnderstudyFrequencyGuidanceSampler; ")
    answered, gathered = labels.answered_for(path)
    assert {"c2pa.actions.v2", "c2pa.ingredient.v3", "c2pa.ingredient.v3__1"} < answered and not gathered
    created, method = actions(path)
    assert len(created["parameters"]["ingredients"]) == 2
    assert method["softwareAgent"]["name"] == "UnderstudyFrequencyGuidanceSampler"
    assert method["parameters"]["settings"] == {
        "phase_high": 0.25, "seed": str(2**64 - 1), "source": "anna.png", "driving": "dance.jpg [output]",
    }


def test_named_files_are_ingredients_too(folders, certificate):
    for name in ("a.png", "b.png"):
        (folders.input / name).write_bytes(labels.red_png())
    (path,) = labels.label(folders, sources=" a.png\n\nb.png [input]\n")
    assert set(ingredients(path)) == {"a.png", "b.png"}


def test_learned_files_are_ingredients_by_sha256(folders, certificate, monkeypatch, tmp_path):
    lora = weights.save({"a": torch.ones(2)}, {}, "loras", "anna")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(lora.parent)], {".safetensors"}))
    prompt = graph()
    prompt["lora"] = {"class_type": "LoraLoader", "inputs": {"lora_name": lora.name}}
    prompt["method"]["inputs"]["model"] = ["lora", 0]
    (path,) = labels.label(folders, prompt=prompt)
    each = ingredients(path)[lora.name]
    assert each["instance_id"] == f"sha256:{sha256(lora)}"
    assert each["description"] == f"model in loras, lora_name of LoraLoader; SHA-256 {sha256(lora)}"


def test_a_manifest_becomes_part_of_the_result_with_all_that_it_claimed(folders, certificate, told):
    source = folders.input / "signed.png"
    labels.sign_elsewhere(labels.red_png(), source, title="a film", mining="notAllowed")
    before = labels.manifests(source)[0]
    (path,) = labels.label(folders, prompt=graph(source="signed.png"))
    active, report = labels.manifests(path)
    (each,) = active["ingredients"]
    assert report["manifests"][each["active_manifest"]] == before
    assert "notAllowed" in str(before)
    assert "signed.png: its signed manifest becomes part of this one" in told
    assert "notAllowed" in labels.read(f"made/{path.name} [output]")[0]


def test_a_chain_of_results_keeps_every_manifest(folders, certificate):
    (folders.input / "first.png").write_bytes(labels.red_png())
    name = "first.png"
    for length in range(1, 4):
        (path,) = labels.label(folders, prompt=graph(source=name))
        name = f"made/{path.name} [output]"
        assert len(labels.manifests(path)[1]["manifests"]) == length
    claims = labels.read(name)[0]
    assert claims.count("Signed by: Anna") == 3 and "    From: first.png" in claims


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_content_decides_and_not_the_name(folders, certificate, extension):
    """A PNG that is called .jpg keeps its manifest."""
    labels.sign_elsewhere(labels.red_png(), folders.input / f"x.{extension}")
    (path,) = labels.label(folders, prompt=graph(source=f"x.{extension}"))
    assert len(labels.manifests(path)[1]["manifests"]) == 2


def test_a_broken_manifest_is_kept_as_broken(folders, certificate):
    source = folders.input / "broken.png"
    labels.sign_elsewhere(labels.red_png(), source)
    with Image.open(source) as image:
        Image.new("RGB", image.size, "blue").save(folders.input / "blue.png")
    chunk = next(each for each in labels.png_chunks(source.read_bytes()) if each[0] == b"caBX")
    blue = (folders.input / "blue.png").read_bytes()
    place = blue.index(b"IDAT") - 4
    source.write_bytes(blue[:place] + labels.png_chunk(*chunk) + blue[place:])
    (path,) = labels.label(folders, prompt=graph(source="broken.png"))
    each = ingredients(path)["broken.png"]
    codes = [failure["code"] for failure in each["validation_results"]["activeManifest"]["failure"]]
    assert "assertion.dataHash.mismatch" in codes
    assert "its picture was NOT what was signed" in labels.read(f"made/{path.name} [output]")[0]


@pytest.mark.parametrize("damage", ["unreadable manifest", "no picture", "elsewhere"])
def test_what_cannot_be_taken_over_is_told_and_recorded(folders, certificate, told, damage, requests):
    source = folders.input / "x.png"
    labels.sign_elsewhere(labels.red_png(), source, remote=requests.url if damage == "elsewhere" else "")
    content = source.read_bytes()
    if damage == "unreadable manifest":
        place = content.index(b"jumdc2pa") - 8
        source.write_bytes(content[:place] + bytes(4) + content[place + 4:])
    elif damage == "no picture":
        source.write_bytes(content[:50])
    (path,) = labels.label(folders, prompt=graph(source="x.png"))
    words = {
        "unreadable manifest": "its manifest cannot be read", "no picture": "C2PA cannot read it",
        "elsewhere": "its manifest is kept elsewhere",
    }[damage]
    (line,) = [line for line in told if line.startswith("x.png: ")]
    assert words in line and "keep that file too" in line
    assert words in ingredients(path)["x.png"]["description"] and requests.paths == []


@pytest.mark.parametrize("name", ["x.webm", "x.bmp", "x.gif", "x.tiff", "x.mkv", "x.wav"])
def test_formats_without_manifests_are_ingredients(folders, certificate, told, name):
    if name.endswith(("bmp", "gif", "tiff")):
        Image.new("RGB", (8, 8)).save(folders.input / name)
    else:
        (folders.input / name).write_bytes(b"RIFF" + b"a" * 60)
    (path,) = labels.label(folders, prompt=graph(source=name))
    assert name in ingredients(path) and [line for line in told if line.startswith(name)] == []


def test_an_unsigned_result_names_its_sources_and_says_what_it_cannot_carry(folders, told):
    (folders.input / "plain.png").write_bytes(labels.red_png())
    labels.sign_elsewhere(labels.red_png(), folders.input / "signed.png")
    (path,) = labels.label(folders, prompt=graph(source="plain.png", driving="signed.png"))
    packet = labels.packet(path).decode()
    assert "plain.png" in packet and sha256(folders.input / "plain.png") in packet
    assert "its signed manifest is not in this unsigned file" in packet
    assert any(line.startswith("signed.png: its signed manifest is not in") for line in told)


def test_a_label_of_a_source_stays(folders, certificate):
    """A source that says what it is in its metadata alone is described as that, in manifest and metadata."""
    (source,) = labels.label(folders, label=TRAINED, sign=False)
    (path,) = labels.label(folders, label=COMPOSITE, prompt=graph(source=f"made/{source.name} [output]"))
    assert ingredients(path)[source.name]["description"].endswith(f"labelled {TRAINED}")
    packet = labels.packet(path).decode()
    assert f"{labels.SOURCE_TYPES}{TRAINED}" in packet and f"{labels.SOURCE_TYPES}{COMPOSITE}" in packet
    assert labels.read(f"made/{path.name} [output]")[0].startswith(f"Label: {COMPOSITE} ")


def test_watermarks_are_named_and_removers_warned_of(folders, certificate, told):
    prompt = graph()
    for name, before in (("Watermark", "method"), ("RemoveWatermark", "Watermark")):
        prompt[name] = {"class_type": name, "inputs": {"image": [before, 0]}}
    prompt["label"]["inputs"]["images"] = ["RemoveWatermark", 0]
    (path,) = labels.label(folders, prompt=prompt)
    marks = [each["softwareAgent"]["name"] for each in actions(path) if each["action"].startswith("c2pa.watermarked")]
    assert marks == ["Watermark"] and "RemoveWatermark takes a mark out of the picture" in told
    assert any("that Watermark puts a watermark into the picture, which is known by its name" in t for t in told)


def test_a_title_that_makes_a_claim_is_told(folders, certificate, told):
    prompt = graph()
    prompt["blur"] = {"class_type": "Blur", "inputs": {"image": ["method", 0]}, "_meta": {"title": "No watermark"}}
    prompt["label"]["inputs"]["images"] = ["blur", 0]
    labels.label(folders, prompt=prompt)
    (line,) = [line for line in told if "watermark into" in line]
    assert "that Blur (No watermark) puts" in line and "give it another title" in line
    told.clear()
    labels.label(folders, prompt=prompt, sign=False)
    assert not any("watermark into" in line for line in told), "without a manifest nothing is claimed"


def test_folders_and_graphs_without_history_are_told(folders, certificate, told):
    prompt = graph()
    prompt["method"]["inputs"]["images"] = ["set", 0]
    prompt["set"] = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "anna"}}
    labels.label(folders, prompt=prompt)
    assert any(line.startswith("the files in anna are not named one by one") for line in told)
    labels.UnderstudyLabelMedia.PREPARE_CLASS_CLONE(None).execute(
        filename_prefix="x", label=COMPOSITE, sign=True, images=labels.pictures()
    )
    assert "the graph does not say what led here: name the files in sources" in told


def test_names_of_files_in_any_script(folders, certificate):
    name = "アンナ & <b> \u202e.png"
    (folders.input / name).write_bytes(labels.red_png())
    (path,) = labels.label(folders, prompt=graph(source=name))
    assert name in ingredients(path)
    assert labels.read(f"made/{path.name} [output]")[1:] == (True, True)
