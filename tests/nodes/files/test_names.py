"""Names of weight files: none escapes the output folder, and none replaces another."""

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.files import names, weights

WEIGHTS = {"weight": torch.arange(12.0).reshape(3, 4)}

REFUSED = None
BAD_NAMES = {
    "../anna": REFUSED, "../../etc/anna": REFUSED, "a/../../anna": REFUSED, "a/..": REFUSED, "..": REFUSED,
    ".. /anna": REFUSED, "..\\anna": REFUSED, "a\\..\\..\\anna": REFUSED, "/etc/anna": REFUSED,
    "//server/share/anna": REFUSED, "\\\\server\\share": REFUSED, "C:\\anna": REFUSED, "c:anna": REFUSED,
    "": REFUSED, " ": REFUSED, ".": REFUSED, "...": REFUSED, "/": REFUSED, "///": REFUSED,
    "a/b/c/d/e/f/g/h/i": REFUSED,
    "anna\0": "anna_", "an\nna": "an_na", "an\r\nna": "an__na", "\x1b[31manna": "_[31manna",
    "anna\x7f": "anna_", "anna\u202egnp": "anna_gnp", "anna\ud800": "anna_", "anna\u2028b": "anna_b",
    "a:b": REFUSED, "anna:b": "anna_b", 'a<b>"c"|d?e*f': "a_b__c__d_e_f",
    "con": "_con", "NUL.txt": "_NUL.txt", "a/COM1/b": "a/_COM1/b", "lpt¹": "_lpt¹", "aux ": "_aux",
    "anna. . .": "anna", " anna ": "anna", ".hidden": "hidden", ".git/hooks": "git/hooks", "a//./b": "a/b",
    "e\u0301lodie": "\u00e9lodie", "a" * 300: "a" * 120, "\u00e9" * 300: "\u00e9" * 60, "猫" * 300: "猫" * 40,
    "-rf": "-rf", "$(touch x)": "$(touch x)", "~/anna": "~/anna", "%00": "%00", "👩\u200d🎤": "👩\u200d🎤",
}


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names_stay_inside_and_overwrite_nothing(tmp_path, output, name):
    expected = BAD_NAMES[name]
    if expected is REFUSED:
        with pytest.raises(names.WeightFileError, match=r"(?s)^filename_prefix .*inside the output folder"):
            weights.save(WEIGHTS, {}, "loras", name)
        assert files_in(tmp_path) == {}
        return
    first = weights.save(WEIGHTS, {}, "loras", name)
    assert first == output / "loras" / f"{expected}_00001_.safetensors"
    before = files_in(tmp_path)
    second = weights.save({"other": torch.zeros(1)}, {}, "loras", name)
    assert second == output / "loras" / f"{expected}_00002_.safetensors"
    after = files_in(tmp_path)
    assert after.keys() == {first, second} and after[first] == before[first]


def test_there_are_forty_bad_names():
    assert len(BAD_NAMES) >= 40


@settings(max_examples=400)
@given(st.text(st.one_of(st.characters(), st.sampled_from("./\\: \0\n%CONnul~")), max_size=150))
def test_no_text_becomes_a_name_outside_the_folder(text):
    try:
        name = names.normalise_prefix(text)
    except names.WeightFileError:
        return
    assert names.normalise_prefix(name) == name
    assert name == unicodedata.normalize("NFC", name)
    for part in name.split("/"):
        assert part and part not in (".", "..") and len(part.encode()) <= names.MAX_PART + 1
        assert part == part.strip(" .") and not set(part) & set('\0\n\\:<>"|?*')
    assert os.path.normpath(os.path.join("/output", name)).startswith("/output/")


def test_one_name_in_two_unicode_forms_is_one_series(output):
    names = [weights.save(WEIGHTS, {}, "loras", form).name for form in ("\u00e9", "e\u0301")]
    assert names == ["\u00e9_00001_.safetensors", "\u00e9_00002_.safetensors"]


def test_a_leading_folder_key_is_not_doubled(output):
    assert weights.save(WEIGHTS, {}, "loras", "loras/anna") == output / "loras" / "anna_00001_.safetensors"


@pytest.mark.parametrize("link", ["loras", "loras/people", "loras/people/deep"])
def test_links_out_of_the_output_folder_are_refused(tmp_path, output, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (output / link).parent.mkdir(parents=True, exist_ok=True)
    (output / link).symlink_to(outside, target_is_directory=True)
    with pytest.raises(names.WeightFileError, match="link"):
        weights.save(WEIGHTS, {}, "loras", "people/deep/anna")
    assert list(outside.iterdir()) == []


def test_a_link_in_the_way_of_the_file_is_not_followed(tmp_path, output):
    (output / "loras").mkdir()
    (output / "loras" / "anna_00001_.safetensors").symlink_to(tmp_path / "elsewhere")
    assert weights.save(WEIGHTS, {}, "loras", "anna").name == "anna_00002_.safetensors"
    assert not (tmp_path / "elsewhere").exists()
