"""What every kind of learned file does with consent: it survives load and save, is shown, warns, and stops."""

import dataclasses
import json
import logging
from datetime import datetime, timezone

import folder_paths
import pytest
import torch
from pack.nodes.action_identifier import files as actions
from pack.nodes.action_identifier.method import ANY_ENCODER, ActionIdentifier
from pack.nodes.action_identifier.nodes import UnderstudyLoadActionIdentifier
from pack.nodes.action_identifier.training_nodes import UnderstudySaveActionIdentifier
from pack.nodes.consent import gate
from pack.nodes.consent.record import ENTRY, NO_PERSON, PURPOSES, ConsentError, ConsentRecord
from pack.nodes.extension import METHOD_NODES
from pack.nodes.files import weights
from pack.nodes.fusion_embedding import files as fusion_files
from pack.nodes.fusion_embedding.method import Fusion
from pack.nodes.fusion_embedding.nodes import UnderstudyLoadFusion
from pack.nodes.fusion_embedding.training_nodes import UnderstudySaveFusion
from pack.nodes.identity_prior import files as priors
from pack.nodes.identity_prior.nodes import UnderstudyLoadIdentityPrior
from pack.nodes.identity_prior.training_nodes import UnderstudySaveIdentityPrior
from pack.nodes.library import entries, listing, sidecars
from pack.nodes.subject_tokens import Subject
from pack.nodes.video_identity import files as adapters
from pack.nodes.video_identity import method
from pack.nodes.video_identity.nodes import UnderstudyLoadVideoIdentityAdapter
from pack.nodes.video_identity.training_nodes import UnderstudySaveVideoIdentityAdapter
from support import fusions, tiny_model
from support.identity_trainings import lora_of

ANNA = ConsentRecord("Anna", ("private", "training"), "Ben", "2026-01-01", "2099-12-31", "form 7: 同意書")
NOON = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def noon(output, monkeypatch):
    monkeypatch.delenv("UNDERSTUDY_REQUIRE_CONSENT", raising=False)
    monkeypatch.setattr(gate, "_now", lambda: NOON)
    for folder in (actions.FOLDER, fusion_files.FOLDER):
        folder.register()
    for name in ("loras", "embeddings"):
        folder_paths.add_model_folder_path(name, str(output / name))


@dataclasses.dataclass
class Kind:
    """One kind of learned file: `carrier` is saved, and loaded again."""

    carrier: object
    folder: object
    save_node: type
    load_node: type
    before: tuple = ()  # inputs of both nodes
    saved: tuple = ()  # inputs of the Save node alone
    loaded: tuple = ()  # inputs after the file's name
    output: int = 0  # of the Load node

    def save(self, carrier=None, **inputs):
        """The name under which ComfyUI lists the file."""
        folder_paths.filename_list_cache.clear()
        listed = set(self.folder.choices())
        self.save_node.execute(*self.saved, carrier or self.carrier, "anna", **inputs)
        folder_paths.filename_list_cache.clear()
        (name,) = set(self.folder.choices()) - listed
        return name

    def load(self, name, **inputs):
        return self.load_node.execute(*self.before, name, *self.loaded, **inputs).result[self.output]

    def path(self, name):
        return self.folder.find(name)


MODEL = tiny_model.as_loaded(tiny_model.picture())
LORA = lora_of(MODEL)
KINDS = {
    "identity": lambda: Kind(
        Subject("sks", "robot"), priors.FOLDER, UnderstudySaveIdentityPrior, UnderstudyLoadIdentityPrior,
        before=(MODEL,), saved=(LORA,), loaded=(1.0,), output=1,
    ),
    "action": lambda: Kind(
        ActionIdentifier("<a>", "dancing", {ANY_ENCODER: torch.ones(1, 1, 8)}), actions.FOLDER,
        UnderstudySaveActionIdentifier, UnderstudyLoadActionIdentifier,
    ),
    "fusion": lambda: Kind(
        Fusion(fusions.combiner()), fusion_files.FOLDER, UnderstudySaveFusion, UnderstudyLoadFusion
    ),
    "adapter": lambda: Kind(
        method.new_adapter(8, 2, 2, int), adapters.FOLDER, UnderstudySaveVideoIdentityAdapter,
        UnderstudyLoadVideoIdentityAdapter,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def with_consent(kind, consent=ANNA):
    return dataclasses.replace(kind.carrier, consent=consent)


def test_it_survives_save_load_save_and_load(kind):
    once = kind.load(kind.save(consent=ANNA))
    again = kind.load(kind.save(once))
    assert once.consent == again.consent == ANNA
    carried = kind.load(kind.save(with_consent(kind)))
    assert carried.consent == ANNA
    metadata = weights.inspect(kind.path(kind.save(again)))[1]
    assert json.loads(metadata[ENTRY])["note"] == "form 7: 同意書"


def test_a_file_without_it_loads_as_before(kind, caplog):
    name = kind.save()
    assert ENTRY not in weights.inspect(kind.path(name))[1]
    assert kind.load(name).consent is None and "consent" not in caplog.text
    assert kind.load_node.fingerprint_inputs(**{kind.load_node.FILE: name}) == kind.folder.fingerprint(name)


def test_the_loader_shows_it_and_what_it_does_not_cover(kind, caplog):
    name = kind.save(consent=ANNA)
    with caplog.at_level(logging.INFO):
        kind.load(name, purpose="private")
    assert "consent of Anna for private, training, from Ben, since 2026-01-01, until 2099-12-31" in caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == [] and "form 7" not in caplog.text
    kind.load(name, purpose="commercial")
    assert "consent of Anna is for private, training, and not for commercial" in caplog.text
    caplog.clear()
    kind.load(kind.save(), purpose="private")
    assert "there is no consent record" in caplog.text


def test_where_it_is_required_a_loader_stops(kind, monkeypatch):
    puppet = ConsentRecord("a puppet", (NO_PERSON,))
    covered, missing, nobody = kind.save(consent=ANNA), kind.save(), kind.save(consent=puppet)
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", "1")
    assert kind.load(covered, purpose="training").consent == ANNA
    assert all(kind.load(nobody, purpose=purpose).consent == puppet for purpose in PURPOSES)
    for name, purpose, message in (
        (covered, "editorial", "is for private, training, and not for editorial"),
        (covered, "unspecified", "purpose is unspecified"), (missing, "private", "there is no consent record"),
    ):
        with pytest.raises(ConsentError, match=f"{message}.*Require consent"):
            kind.load(name, purpose=purpose)


def test_consent_that_ends_makes_a_cached_loader_run_again(kind, monkeypatch):
    name = kind.save(consent=dataclasses.replace(ANNA, expires="2026-11-29"))
    asked = {kind.load_node.FILE: name, "purpose": "private"}
    before = kind.load_node.fingerprint_inputs(**asked)
    monkeypatch.setattr(gate, "_now", lambda: NOON.replace(day=29))
    ended = kind.load_node.fingerprint_inputs(**asked)
    linked = {kind.load_node.FILE: None, "purpose": None}
    assert kind.load_node.fingerprint_inputs(**linked) == ""
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", "1")
    assert len({before, ended, kind.load_node.fingerprint_inputs(**asked)}) == 3
    assert kind.load_node.fingerprint_inputs(**linked) == "2026-11-30"


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1, "subject": 5}', "x" * 100_000, '{"version": 9}'])
def test_a_record_that_cannot_be_read_counts_as_missing(kind, text, caplog, monkeypatch):
    path = kind.path(kind.save())
    tensors, metadata = weights.read(path)
    weights.save(tensors, {**metadata, ENTRY: text}, kind.folder.name, "hostile")
    folder_paths.filename_list_cache.clear()
    assert kind.load("hostile_00001_.safetensors").consent is None
    assert "its consent record cannot be read and counts as missing" in caplog.text
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", "1")
    with pytest.raises(ConsentError, match="no consent record"):
        kind.load("hostile_00001_.safetensors", purpose="private")


def test_a_connected_record_takes_another_s_place_and_an_empty_one_removes_it(kind, caplog):
    ben = ConsentRecord("Ben", ("commercial",))
    loaded = kind.load(kind.save(with_consent(kind)))
    assert kind.load(kind.save(loaded, consent=ben)).consent == ben
    assert "replaced: consent of Anna for private, training" in caplog.text
    name = kind.save(loaded, consent=ConsentRecord())
    assert kind.load(name).consent is None and b"Anna" not in kind.path(name).read_bytes()


def test_a_note_of_100_000_characters_is_in_the_file(kind):
    long = dataclasses.replace(ANNA, note="{:\n\x00説" * 20_000)
    assert kind.load(kind.save(consent=long)).consent == long


def test_a_preview_is_saved_beside_it_and_ends_nothing_before(kind):
    name = kind.save(preview=torch.rand(2, 6, 4, 3))
    picture, problem = sidecars.preview(kind.path(name))
    assert not problem and picture.shape == (1, 6, 4, 3)
    before = list(kind.path(name).parent.iterdir())
    with pytest.raises(ValueError, match="preview has shape"):
        kind.save(preview=torch.rand(6, 4))
    assert list(kind.path(name).parent.iterdir()) == before


def test_tags_and_author_are_what_the_library_shows(kind):
    entry = entries.read(kind.path(kind.save(tags="red, toy \n red，赤い", author=" Zoë  Å. ")), listing.KINDS)
    assert entry.kind and (entry.tags, entry.author) == (("red", "toy", "赤い"), "Zoë Å.")
    untold = kind.path(kind.save())
    assert not {"modelspec.tags", "modelspec.author"} & weights.inspect(untold)[1].keys()
    before = list(untold.parent.iterdir())
    for wrong in ({"tags": ",".join(map(str, range(21)))}, {"tags": "a, " + "x" * 81}, {"author": "x" * 81}):
        with pytest.raises(ValueError, match=f"{min(wrong)} .* at most"):
            kind.save(**wrong)
    assert list(untold.parent.iterdir()) == before


def test_an_exported_embedding_keeps_it():
    action = KINDS["action"]()
    UnderstudySaveActionIdentifier.execute(action.carrier, "anna", textual_inversion=True, consent=ANNA)
    folder_paths.filename_list_cache.clear()
    assert UnderstudyLoadActionIdentifier.execute("embeddings/anna_00001_.safetensors").result[0].consent == ANNA


def test_training_warns_or_stops_and_hands_it_on(monkeypatch, caplog):
    assert gate.check_training("Train", None) is None and gate.check_training("Train", ANNA) == ANNA
    assert gate.check_training("Train", None, ANNA) == ANNA and caplog.text == ""
    private = dataclasses.replace(ANNA, scopes=("private",))
    assert gate.check_training("Train", private, ANNA) == private
    assert "Train: replaced: consent of Anna" in caplog.text and "and not for training" in caplog.text
    assert gate.check_training("Train", ConsentRecord(), ANNA) is None
    monkeypatch.setenv("UNDERSTUDY_REQUIRE_CONSENT", "yes")
    assert gate.check_training("Train", ANNA) == ANNA
    assert gate.check_training("Train", ConsentRecord("a puppet", (NO_PERSON,)))
    for consent in (None, private, ConsentRecord(), dataclasses.replace(ANNA, expires="2026-11-27")):
        with pytest.raises(ConsentError, match="connect a Consent Record for training to consent"):
            gate.check_training("Train", consent)


def test_every_train_save_and_load_node_asks():
    asked = {"Train": ("consent", "UNDERSTUDY_CONSENT"), "Save": ("consent", "UNDERSTUDY_CONSENT"),
             "Load": ("purpose", "COMBO")}
    counts = dict.fromkeys(asked, 0)
    for node in METHOD_NODES:
        schema = node.GET_SCHEMA()
        verb = schema.display_name.split()[0]
        if verb in asked:
            optional = {(widget.id, widget.io_type) for widget in schema.inputs if widget.optional}
            assert asked[verb] in optional, schema.node_id
            counts[verb] += 1
    assert counts == {"Train": 6, "Save": 4, "Load": 4} and len(PURPOSES) == 5
