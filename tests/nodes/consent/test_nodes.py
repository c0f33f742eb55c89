"""The Consent Record node: what is typed is recorded, and pictures only as digests that others can compute."""

import hashlib
import io

import numpy as np
import pytest
import torch
from pack.nodes.consent.nodes import UnderstudyConsentRecord, picture_digests
from pack.nodes.consent.record import NO_PERSON, ConsentError, ConsentRecord
from PIL import Image

EMPTY = dict.fromkeys(("subject", "granted_by", "granted_on", "expires", "note"), "")


def recorded(scopes=("private",), **typed):
    return UnderstudyConsentRecord.execute(scopes=list(scopes), **{**EMPTY, **typed}).result[0]


def test_what_is_typed_is_recorded_and_nothing_else():
    typed = {
        "subject": " Анна ", "granted_by": "母", "granted_on": "2026-11-28", "expires": "2027-12-31", "note": "n"
    }
    assert recorded(["training", "private"], **typed) == ConsentRecord(
        "Анна", ("private", "training"), "母", "2026-11-28", "2027-12-31", "n"
    )


def test_a_single_scope_may_be_a_text():
    record = UnderstudyConsentRecord.execute(scopes="training", **{**EMPTY, "subject": "A"}).result[0]
    assert record == ConsentRecord("A", ("training",))


def test_a_drawn_figure_is_no_person():
    assert recorded(["no person"], subject="a mascot") == ConsentRecord("a mascot", (NO_PERSON,))


def test_without_any_text_it_is_the_empty_record_whatever_the_scopes():
    assert recorded(["private"]) == ConsentRecord() and recorded([], note=" \n") == ConsentRecord()


@pytest.mark.parametrize(("scopes", "typed", "message"), [
    (7, {"subject": "A"}, "scopes is 7: use a list of private"),
    (["sale"], {"subject": "A"}, "scopes is 'sale': use one of private"),
    ([], {"subject": "A"}, "scopes is empty"), (["private"], {"note": "n"
    }, "subject is empty"),
    (["private"], {"subject": "A", "expires": "tomorrow"}, "expires is 'tomorrow'"),
])
def test_errors_name_the_input(scopes, typed, message):
    with pytest.raises(ValueError, match=message):
        UnderstudyConsentRecord.execute(scopes=scopes, **{**EMPTY, **typed})


def test_a_digest_is_that_of_the_picture_s_bytes_whatever_file_it_came_from():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = hashlib.sha256(b"7x5\n" + pixels.tobytes()).hexdigest()
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    reread = np.asarray(Image.open(png).convert("RGB"))
    as_loaded = torch.from_numpy(reread.astype(np.float32) / 255.0)[None]
    alpha = torch.cat([as_loaded, torch.rand(1, 5, 7, 1)], dim=-1)
    assert picture_digests(as_loaded) == picture_digests(alpha) == (expected,)
    assert picture_digests(torch.cat([as_loaded] * 3)) == (expected,)
    grey = as_loaded[..., :1]
    assert picture_digests(grey) == picture_digests(grey.expand(-1, -1, -1, 3)) != (expected,)
    record = UnderstudyConsentRecord.execute(scopes=["private"], **{**EMPTY, "subject": "A"}, references=as_loaded)
    assert record.result[0].references == (expected,)


def test_pictures_without_a_subject_and_tensors_of_other_kinds_are_refused():
    with pytest.raises(ConsentError, match="subject is empty"):
        UnderstudyConsentRecord.execute(scopes=["private"], **EMPTY, references=torch.zeros(1, 2, 2, 3))
    for tensor in (torch.zeros(2, 2, 3), torch.zeros(0, 2, 2, 3), torch.full((1, 2, 2, 3), torch.nan)):
        with pytest.raises(ValueError, match="references"):
            picture_digests(tensor)
