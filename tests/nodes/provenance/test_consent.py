"""Consent in labelled files: all but the note, in manifest and metadata, and what is said where it does not hold."""

import pytest
from pack.nodes.consent.record import ConsentError, ConsentRecord
from pack.nodes.provenance import nodes
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


@pytest.mark.parametrize("required", [True, False])
def test_a_record_that_does_not_hold_warns_or_stops(folders, certificate, required, monkeypatch):
    told = []
    monkeypatch.setattr(nodes, "tell", lambda _node, some, *_level: told.extend(some))
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", str(int(required)))
    old = ConsentRecord("Anna", ("private",), expires="2020-01-01")
    if required:
        with pytest.raises(ConsentError, match="ended with 2020-01-01: connect a Consent Record that holds"):
            labels.label(folders, consent=old)
        assert list(folders.output.rglob("*.png")) == []
    else:
        assert labels.label(folders, consent=old)
        assert "consent of Anna ended with 2020-01-01" in told
