"""The list of learned files: kinds, versions, consent, and what is damaged or foreign."""

import json
import os
from datetime import datetime, timezone

import folder_paths
import pytest
from pack.nodes.consent.record import ENTRY, ConsentRecord
from pack.nodes.files import weights
from pack.nodes.files.kinds import DATE
from pack.nodes.library import entries, listing

NOON = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)
ANNA = ConsentRecord("Anna M.", ("private",), "Ben", "2026-01-01", "2027-12-31", "the note")


def by_file():
    folder_paths.filename_list_cache.clear()
    return {file.file: file for file in listing.all_files()}


def lines(base=""):
    return {name: listing.line(file, base, NOON) for name, file in by_file().items()}


def test_each_kind_is_told_by_its_header(saving):
    saving.identity(consent=ANNA), saving.action(), saving.fusion(), saving.adapter()
    entry = {name: file.entry for name, file in by_file().items()}
    assert {name: (e.kind, e.holds, e.base) for name, e in entry.items()} == {
        "anna_00001_.safetensors": ("identity prior", "sks robot", "0123456789abcdef"),
        "flex_00001_.safetensors": ("action", "<a>", ""),
        "posed_00001_.safetensors": ("fusion", "combiner", ""),
        "face_00001_.safetensors": ("video identity adapter", "2 blocks of width 8", ""),
    }
    today = datetime.now(timezone.utc).strftime("%Y-%m-%dT")
    assert all(e.made.startswith(today) and e.made.endswith("Z") for e in entry.values())
    assert [file.folder for file in by_file().values()] == sorted(
        (file.folder for file in by_file().values()), key=["loras", "action_identifiers", "fusion_embeddings"].index
    )


def test_a_line_says_fit_consent_tags_and_author(saving):
    saving.identity("old")
    saving.identity("anna", ConsentRecord("Anna M.", ("private",), expires="2026-11-27"))
    path = saving.identity("anna", ANNA)
    tensors, metadata = weights.read(path)
    weights.save(tensors, {
        **metadata, "modelspec.tags": "robot, \u202ered\n,, toys", "modelspec.author": "Zoë\x1b[2J",
        DATE: "2026-11-01",
    }, "loras", "tagged")
    assert lines("0123456789abcdef")["tagged_00001_.safetensors"] == (
        "tagged version 1: sks robot; of the connected model; consent for private until 2027-12-31; made 2026-11-01;"
        " by Zoë [2J; robot, red, toys"
    )
    said = lines("f" * 16)
    assert "anna version 2: sks robot; of another base model, 0123456789abcdef; " in said["anna_00002_.safetensors"]
    assert "consent ended with 2026-11-27" in said["anna_00001_.safetensors"]
    assert "base model 0123456789abcdef; no consent record" in lines()["old_00001_.safetensors"]
    assert "Anna" not in str(said) and "note" not in str(said)


def test_versions_are_the_numbers_of_saving_and_none_is_replaced(saving):
    paths = [saving.identity("sub/anna") for _ in range(3)]
    os.remove(paths[1])
    saving.identity("sub/anna")
    files = list(by_file().values())
    assert [(file.name, file.version) for file in files] == [(os.path.join("sub", "anna"), n) for n in (1, 3, 4)]
    name = os.path.join("sub", "anna")
    assert listing.choose(files, "identity prior", name, 0).version == 4
    assert listing.choose(files, "identity prior", name, 3).path == paths[2]
    with pytest.raises(ValueError, match="version is 2: .*anna has 1, 3, 4. Choose one of them, or 0"):
        listing.choose(files, "identity prior", name, 2)
    assert entries.name_and_version("anna.safetensors") == ("anna.safetensors", 1)
    assert entries.name_and_version("anna_00012_.safetensors") == ("anna", 12)


def test_what_is_damaged_or_foreign_is_listed_as_such_and_cannot_be_chosen(saving, output):
    saving.identity(), saving.other("style"), saving.other("spoilt", understudy_identity="{")
    (output / "loras" / "cut_00001_.safetensors").write_bytes(b"\xff" * 5)
    (output / "loras" / "old.ckpt").write_bytes(b"PK\x03\x04 no adapter")
    (output / "loras" / "published.ckpt").write_bytes(b"PK\x03\x04 blocks.0.self_attn.q_loras.down.weight")
    os.mkfifo(output / "loras" / "pipe_00001_.safetensors")
    saving.other("other", "action_identifiers", kind="something else")
    said = lines()
    assert said["style_00001_.safetensors"].endswith("foreign: not a learned file of this pack")
    assert said["other_00001_.safetensors"].endswith("foreign: not a learned file of this pack")
    assert said["spoilt_00001_.safetensors"].startswith("spoilt_00001_.safetensors: damaged: ")
    assert "damaged: is truncated at 5 bytes" in said["cut_00001_.safetensors"]
    assert "damaged: is not a regular file" in said["pipe_00001_.safetensors"]
    assert said["old.ckpt"] == "old.ckpt: a pickle, which is opened only to be loaded"
    assert by_file()["published.ckpt"].entry.kind == "video identity adapter"
    files = listing.all_files()
    assert listing.names(files) == ["anna", "published.ckpt"]
    with pytest.raises(ValueError, match="name is 'cut': its file is damaged: is truncated.*Choose another"):
        listing.choose(files, "identity prior", "cut", 0)
    with pytest.raises(ValueError, match="there is no action of that name. There are: none"):
        listing.choose(files, "action", "anna", 0)


@pytest.mark.parametrize("consent", ["{", "[]", "x" * 50_000, '{"version": 1, "subject": 4}'])
def test_a_consent_record_that_cannot_be_read_is_said(saving, consent):
    tensors, metadata = weights.read(saving.identity())
    weights.save(tensors, {**metadata, ENTRY: consent}, "loras", "hostile")
    assert "its consent record cannot be read" in lines()["hostile_00001_.safetensors"]


@pytest.mark.parametrize("text", [
    "{}", "[]", '"sks"', '{"token": ["a"], "class_noun": {}, "captions": 5, "base": null}', "[" * 50_000,
    json.dumps({"token": "two words", "class_noun": "", "captions": [], "base": ""}),
])
def test_hostile_descriptions_are_damage_and_no_error(saving, text):
    saving.other("hostile", understudy_identity=text)
    assert "damaged" in lines()["hostile_00001_.safetensors"]


def test_a_very_long_hostile_name_stays_one_short_line(saving):
    saving.identity(token="s" * 50_000 + "\u202ex")
    (said,) = lines().values()
    assert len(said) < 400 and said.isprintable()
