"""The Identity Library node: what it hands on fits the Load nodes, and what it says of a model."""

import hashlib

import folder_paths
import pytest
import torch
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.fingerprint import fingerprint
from pack.nodes.library import index, listing
from pack.nodes.library.nodes import UnderstudyIdentityLibrary
from PIL import Image
from support import tiny_model
from support.identity_trainings import lora_of

MODEL = tiny_model.as_loaded(tiny_model.picture())
ANNA = ConsentRecord("Anna", ("private",), "", "", "2099-12-31", "note")


def chosen(kind="identity prior", name="anna", version=0, model=None):
    folder_paths.filename_list_cache.clear()
    return UnderstudyIdentityLibrary.execute(kind=kind, name=name, version=version, model=model).result


def test_each_kind_s_file_is_one_that_its_load_node_lists(saving):
    saving.identity(), saving.action(), saving.fusion(), saving.adapter()
    for kind, name in zip(listing.KINDS, ("anna", "flex", "posed", "face"), strict=True):
        file = chosen(kind.name, name)[0]
        assert file == f"{name}_00001_.safetensors" and file in kind.folder.choices()
    with pytest.raises(ValueError, match="kind is 'lora': use one of identity prior, action, fusion, video identity"):
        chosen("lora")


def test_versions_consent_preview_and_list(saving):
    saving.identity(consent=ConsentRecord("Old", ("private",)))
    newest = saving.identity(consent=ANNA)
    saving.other()
    file, consent, preview, listed = chosen()
    assert (file, consent) == ("anna_00002_.safetensors", ANNA)
    assert chosen(version=1)[:2] == ("anna_00001_.safetensors", ConsentRecord("Old", ("private",)))
    assert preview.shape == (1, 64, 64, 3) and (preview == 0.5).all()
    assert [line.split(":")[0].split(" version")[0] for line in listed.splitlines()] == [
        "anna", "anna", "style_00001_.safetensors"
    ]
    Image.new("RGB", (6, 4), (255, 0, 0)).save(newest.with_suffix(".preview.png"))
    preview = chosen()[2]
    assert preview.shape == (1, 4, 6, 3) and torch.equal(preview[0, 0, 0], torch.tensor([1.0, 0, 0]))


def test_it_says_hash_consent_and_the_others(saving, caplog):
    path = saving.identity(consent=ANNA)
    saving.action(), saving.other()
    for number in range(40):
        saving.identity(f"other {number}")
    with caplog.at_level("INFO"):
        chosen()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"loras/anna_00001_.safetensors, sha256 {digest}" in caplog.text
    assert "consent for private until 2099-12-31" in caplog.text and "there is no preview picture" in caplog.text
    assert "and 11 more: see the output list" in caplog.text and "flex" not in caplog.text
    assert "note" not in caplog.text


def test_the_connected_model_is_compared(saving, caplog):
    saving.identity("mine", base=fingerprint(MODEL))
    saving.identity("foreign", base="f" * 16)
    saving.adapter(), saving.action()
    type(saving).LORA, small = lora_of(MODEL), type(saving).LORA
    saving.identity("same shape", base="f" * 16)
    type(saving).LORA = small
    expected = {
        "mine": "of the connected model", "foreign": "it does not fit the connected model: lora_unet_x.lora_",
        "same shape": "of another base model, ffffffffffffffff",
    }
    for name, words in expected.items():
        caplog.clear()
        with caplog.at_level("INFO"):
            chosen(name=name, model=MODEL)
        assert words in caplog.text and ("does not fit" in caplog.text) == (name == "foreign"), name
    chosen("video identity adapter", "face", model=MODEL)
    assert "needs a Wan video model" in caplog.text
    caplog.clear()
    chosen("video identity adapter", "face", model=tiny_model.as_loaded(tiny_model.wan()))
    assert "it does not fit the connected model: the model has" in caplog.text


def test_it_runs_again_when_the_chosen_file_changed_and_not_for_others(saving):
    path = saving.identity()
    asked = {"kind": "identity prior", "name": "anna", "version": 0}

    def current():
        folder_paths.filename_list_cache.clear()
        return UnderstudyIdentityLibrary.fingerprint_inputs(**asked, model=None)

    before = current()
    saving.identity("ben")
    assert current() == before
    path.write_bytes(path.read_bytes() + b" " * 0)
    assert current() != before
    again = current()
    saving.identity()
    assert current() != again
    assert UnderstudyIdentityLibrary.fingerprint_inputs(kind=None, name=None, version=None, model=None) == ""
    assert index.version(path)[0] > 0
