"""Every input of every Train node through a job: written by Export Training Job, and what the command then gives the
node in its place. What a schema gains is among them.
"""

import types

import folder_paths
import pytest
import torch
from comfy_api.latest import io
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.fusion_embedding import pairs
from pack.nodes.inputs.checked import File
from pack.nodes.training import inputs
from pack.nodes.training_jobs.nodes import TRAININGS, UnderstudyExportTrainingJob
from support import fusions, tiny_model
from trainer import job

import nodes

COUNT = 3
TEXTS = {"identity_token": ["sks"], "class_noun": ["robot"], "captions": [f"{{subject}} {i}" for i in range(COUNT)]}
CONSENT = ConsentRecord(subject="Anna", scopes=("training",))


class Tiny:
    """A loader as V1 nodes are: of a name."""

    FUNCTION = "load"

    def load(self, name):
        return (f"loaded {name}",)


def pictures(seed):
    """Of 8 bits, as a batch and a single one."""
    drawn = torch.randint(0, 256, (COUNT, 8, 6, 3), generator=torch.Generator().manual_seed(seed)).float() / 255
    return [drawn[:2], drawn[2:]]


def other(widget):
    """A value that the schema allows and that is not its default, in a list, as ComfyUI gives it."""
    if widget.id in TEXTS:
        return TEXTS[widget.id]
    if widget.id == "consent":
        return [CONSENT]
    if isinstance(widget, io.Image.Input):
        return pictures(len(widget.id))
    if isinstance(widget, io.Mask.Input):
        return [batch[..., 0] for batch in pictures(9)]
    if isinstance(widget, io.Latent.Input):
        frames = 2 if widget.id == "latents" else 1
        return [{"samples": torch.randn(1, 16, frames, 4, 4)} for _ in range(COUNT)]
    if isinstance(widget, io.Conditioning.Input):
        return [tiny_model.conditioning(i) for i in range(COUNT)]
    if isinstance(widget, File):
        return [pairs.NONE]
    if isinstance(widget, io.Boolean.Input):
        return [not widget.default]
    if isinstance(widget, io.Combo.Input):
        return [next(option for option in widget.options if option != widget.default)]
    if isinstance(widget, io.Int.Input):
        return [widget.default + 1]
    if isinstance(widget, io.Float.Input):
        return [(widget.default + widget.max) / 2]
    if isinstance(widget, io.String.Input):
        return [f"word {widget.id}"]
    return ["a model"]


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Tiny", Tiny)
    return tmp_path


@pytest.mark.parametrize("node", TRAININGS)
def test_what_the_node_would_get_comes_back_from_the_job(node, output, monkeypatch):
    schema = node.define_schema()
    values = {widget.id: other(widget) for widget in schema.inputs if widget.id != "resume_from"}
    if "dataset_folder" in values:
        values |= {role: [batch] for role, batch in fusions.pair_lists(COUNT).items()}
    models = {name for name, value in values.items() if value == ["a model"]}
    prompt = {name: {"class_type": "Tiny", "inputs": {"name": name}} for name in models}
    prompt["9"] = {"class_type": "Export", "inputs": {f"job.{name}": [name, 0] for name in models}}
    monkeypatch.setattr(
        UnderstudyExportTrainingJob, "hidden", types.SimpleNamespace(prompt=prompt, unique_id="9"), raising=False
    )
    UnderstudyExportTrainingJob.execute(job={"job": [schema.display_name], **values}, folder=["anna"])
    folder = output / "training_jobs" / "anna_00001"
    given = {}
    monkeypatch.setattr(node, "execute", lambda **lists: given.update(lists) or types.SimpleNamespace(result=()))
    _, name = job.train(job.read(folder / "job.toml"), folder, "the last checkpoint")
    assert name == schema.display_name and given.pop("resume_from") == ["the last checkpoint"]
    of_pairs = set()
    if "dataset_folder" in values:
        of_pairs = {*pairs.ROLES, "dataset_folder"}
        assert given.pop("dataset_folder") == ["pairs"]
        monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder / "input"))
        found = pairs.open_pairs(dict.fromkeys(pairs.ROLES), "pairs")
        for i, pair in enumerate(found):
            for role in pairs.ROLES:
                assert (getattr(pair, role) - values[role][0][i]).abs().max() <= 0.5 / 255 + 1e-6  # rounded to 8 bits
        assert len(found) == COUNT
    assert given.keys() == values.keys() - of_pairs
    for widget in schema.inputs:
        if widget.id in given:
            check(widget, given[widget.id], values[widget.id])


def check(widget, actual, expected):
    name = widget.id
    if isinstance(widget, io.Image.Input):
        assert torch.equal(torch.cat(list(inputs.pictures(actual, name))), torch.cat(expected))
    elif isinstance(widget, io.Mask.Input):
        assert torch.equal(torch.cat(list(actual)), torch.cat(expected))
    elif isinstance(widget, io.Latent.Input):
        first, second = (inputs.single_latents(latents, name) for latents in (actual, expected))
        assert len(first) == COUNT and inputs.digest(first) == inputs.digest(second)
    elif isinstance(widget, io.Conditioning.Input):
        assert inputs.conditioning_digest(list(actual)) == inputs.conditioning_digest(expected)
    elif name == "consent":
        (record,) = actual
        assert record == CONSENT
    elif expected == ["a model"]:
        assert actual == [f"loaded {name}"]
    elif name in ("captions", "class_captions", "subjects"):
        texts = inputs.texts_for(expected, COUNT, name)
        assert actual == [text.replace("{subject}", "sks robot") for text in texts]
    else:
        assert actual == expected
