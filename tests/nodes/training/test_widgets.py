"""The inputs of every Train node, as ComfyUI's frontend shows them."""

import math

import pytest
from pack.nodes import extension
from pack.nodes.training import widgets

TRAINERS = [node for node in extension.METHOD_NODES if "resume_from" in {i.id for i in node.define_schema().inputs}]


def typed(widget, value):
    """What the frontend makes of a typed number: rounded to as many decimals as the step has, within the limits."""
    decimals = max(0, -math.floor(math.log10(widget.step)))
    return min(max(round(value, decimals), widget.min), widget.max)


def inputs_of(node):
    return {i.id: i for i in node.define_schema().inputs}


@pytest.mark.parametrize("node", TRAINERS)
@pytest.mark.parametrize("rate", [2e-6, 1.5e-5, 1e-4, 3e-3])
def test_learning_rates_can_be_typed_even_the_published_one(node, rate):
    assert typed(inputs_of(node)["learning_rate"], rate) == pytest.approx(rate)


@pytest.mark.parametrize("node", TRAINERS)
def test_a_queued_run_can_be_resumed_under_its_own_seed(node):
    assert inputs_of(node)["seed"].control_after_generate == "fixed"
    assert inputs_of(node)["resume_from"].default == "none"


def test_optional_inputs_that_an_old_workflow_lacks_have_their_defaults():
    values = {"steps": 3, "learning_rate": 0.1, "seed": 4}
    config = widgets.config(values, steps_per_iteration=2, batch_size=5)
    assert (config.steps, config.checkpoint_every, config.batch_size) == (6, 200, 5)
    shown = {
        widget.id: widget.default
        for widget in (widgets.dtype(), *widgets.on_the_way("Steps"))
    }
    assert widgets.config(values | shown, steps_per_iteration=2, batch_size=5) == config


def test_all_nodes_name_what_a_resumed_run_must_share_in_the_same_words(monkeypatch):
    monkeypatch.setattr(widgets, "fingerprint", lambda model: f"of {model}")
    monkeypatch.setattr(widgets, "weight_changes", lambda model: "" if model == "it" else f"on {model}")
    monkeypatch.setattr(widgets, "call_changes", lambda model: "")
    config = widgets.config({"steps": 3, "learning_rate": 0.1, "seed": 4}, batch_size=5)
    shared = {"seed": 4, "batch_size": 5, "learning_rate": 0.1, "dtype": "model", "min_snr_gamma": 0.0}
    assert widgets.settings({"model": "it"}, config, {"rank": 8}) == {"model": "of it", **shared, "rank": 8}
    patched = {"model": "of other", "LoRAs on the model": "on other", **shared}
    assert widgets.settings({"model": "other"}, config, {}) == patched
    assert widgets.settings({}, config, {}) == shared
