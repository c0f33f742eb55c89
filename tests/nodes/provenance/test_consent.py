"""Consent in labelled files: all but the note, in manifest and metadata, and what is said where it does not hold."""

import datetime
import json

import pytest
from launcher.scripts import ROOT
from pack.nodes.consent import gate, record
from pack.nodes.consent.record import NO_PERSON, ConsentError, ConsentRecord
from support import labels

RECORD = ConsentRecord(
    "Anna Ø <&>", ("editorial", "training"), "the agency", "2026-01-02", "2090-12-31", "secret note", ("ab" * 32,)
)


@pytest.mark.parametrize("sign", [True, False])
def test_consent_goes_into_the_file_without_its_note(folders, certificate, sign):
    (path,) = labels.label(folders, consent=RECORD, sign=sign)
    content = path.read_bytes()
    assert b"secret note" not in content
    packet = labels.packet(path).decode()
    assert "consent of Anna Ø &lt;&amp;&gt; for editorial, training, from the agency" in packet
    if sign:
        (stated,) = [
            each["data"] for each in labels.manifests(path)[0]["assertions"]
            if each["label"] == "io.github.understudy.consent"
        ]
        assert stated == {
            "subject": "Anna Ø <&>", "scopes": ["editorial", "training"], "granted_by": "the agency",
            "granted_on": "2026-01-02", "expires": "2090-12-31", "references": ["ab" * 32],
        }
        assert labels.answered_for(path) == [
            {"c2pa.actions.v2", "io.github.understudy.consent", "c2pa.hash.data"}, set()
        ]
        assert "Consent: " in labels.read(f"made/{path.name} [output]")[0]


def test_the_node_that_typed_it_adds_nothing_to_the_manifest(folders, certificate):
    """Its note is in the workflow, as in every picture that ComfyUI saves; help says so."""
    (folders.input / "reference.png").write_bytes(labels.red_png())
    prompt = {
        "reference": {"class_type": "LoadImage", "inputs": {"image": "reference.png"}},
        "consent": {
            "class_type": "UnderstudyConsentRecord",
            "inputs": {"subject": "Anna", "note": "secret note", "references": ["reference", 0]},
        },
        "train": {"class_type": "UnderstudyTrainIdentityPrior", "inputs": {"steps": 3, "consent": ["consent", 0]}},
        "label": {
            "class_type": "UnderstudyLabelMedia", "inputs": {"images": ["train", 0], "consent": ["consent", 0]},
        },
    }
    (path,) = labels.label(folders, consent=RECORD, prompt=prompt)
    active = labels.manifests(path)[0]
    assert "UnderstudyTrainIdentityPrior" in str(active) and "ingredients" not in active
    assert "secret note" not in str(active) and "secret note" not in labels.packet(path).decode()


@pytest.mark.parametrize("record", [None, ConsentRecord()])
def test_no_record_or_the_empty_one_says_nothing(folders, certificate, record):
    (path,) = labels.label(folders, consent=record)
    assert "onsent" not in labels.packet(path).decode()
    assert len(labels.manifests(path)[0]["assertions"]) == 1


OLD = ConsentRecord("Anna", ("private",), expires="2020-01-01")
NOBODY = ConsentRecord("a paper puppet", (NO_PERSON,))
ENDED, OTHER = "consent of Anna ended with 2020-01-01", "is for editorial, training, and not for commercial"


@pytest.mark.parametrize("consent, purpose, warned, stopped", [
    (OLD, "unspecified", ENDED, ENDED), (OLD, "private", ENDED, ENDED), (RECORD, "commercial", OTHER, OTHER),
    (RECORD, "editorial", "", ""), (RECORD, "unspecified", "", "purpose is unspecified"),
    (None, "unspecified", "", record.MISSING), (None, "editorial", record.MISSING, record.MISSING),
    (NOBODY, "unspecified", "", ""), (NOBODY, "commercial", "", ""),
])
@pytest.mark.parametrize("required", [True, False])
def test_what_a_record_does_not_cover_warns_or_stops(
    folders, consent, purpose, warned, stopped, required, monkeypatch, caplog
):
    """Labelling is publishing: it asks for a purpose, and for a record where one is required, as the loaders do."""
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", str(int(required)))
    if required and stopped:
        with pytest.raises(ConsentError, match=f"{stopped}.*: connect a Consent Record that holds to consent"):
            labels.label(folders, consent=consent, purpose=purpose, sign=False)
        assert list(folders.output.rglob("*.png")) == []
        return
    assert labels.label(folders, consent=consent, purpose=purpose, sign=False)
    assert warned in caplog.text if warned else not [r for r in caplog.records if r.levelname == "WARNING"]


def test_purpose_is_the_last_input_and_asks_for_nothing_by_itself():
    last = labels.UnderstudyLabelMedia.define_schema().inputs[-1]
    assert (last.id, last.optional, last.default) == ("purpose", True, "unspecified")


def test_the_template_s_consent_covers_all_that_it_does():
    workflow = json.loads((ROOT / "workflows" / "Puppets-7a-Consent-to-label.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    agreed = ConsentRecord(nodes["UnderstudyConsentRecord"][0], tuple(nodes["UnderstudyConsentRecord"][1]))
    purpose = nodes["UnderstudyLabelMedia"][-1]
    assert purpose == "editorial"
    for used in (purpose, gate.TRAINING):
        assert record.problems(agreed, used, datetime.datetime.now(datetime.timezone.utc)) == []
