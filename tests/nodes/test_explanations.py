"""Who asks for an explanation: the walk through the graph as it was sent."""

import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from pack.nodes import explanations

GRAPH = {
    "apply": {"class_type": "UnderstudyApplyVideoIdentity", "inputs": {
        "strength": 1.0, "scopes": [], "curve": [[0, 0], [1, 1]], "boxes": [{"x": 1}, {"x": 2}],
    }},
    "sampler": {"class_type": "KSampler", "inputs": {"model": ["apply", 0], "seed": 3}},
    "second": {"class_type": "KSampler", "inputs": {"model": ["apply", 0], "latent_image": ["sampler", 0]}},
    "other": {"class_type": "KSampler", "inputs": {"model": ["apply", 0]}},
    "explain": {"class_type": explanations.NODE, "inputs": {"model": ["apply", 0], "samples": ["second", 0]}},
}


@pytest.mark.parametrize(("node", "expected"), [
    ("second", True), ("sampler", True), ("other", False), ("made while it ran", True)
])
def test_what_leads_to_the_node_is_recorded(monkeypatch, node, expected):
    monkeypatch.setattr(explanations, "_prompts", lambda: {"run": GRAPH})
    with CurrentNodeContext("run", node):
        assert explanations.is_asked() is expected
    assert explanations.fingerprint() == "explained"


def test_without_the_node_or_a_run_nobody_asks(monkeypatch):
    without = {name: node for name, node in GRAPH.items() if name != "explain"}
    monkeypatch.setattr(explanations, "_prompts", lambda: {"run": without})
    with CurrentNodeContext("run", "sampler"):
        assert explanations.is_asked() is False
    with CurrentNodeContext("another run", "sampler"):
        assert explanations.is_asked() is False
    assert explanations.is_asked() is False and explanations.fingerprint() == ""


def test_the_last_runs_are_remembered_by_their_samples():
    runs, samples = explanations.Runs(), [torch.full((1, 4, 2, 2), float(i)) for i in range(6)]
    for i, latent in enumerate(samples):
        runs.add(latent, i)
    assert [runs.of(latent) for latent in samples[2:]] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="older than its last 4 runs"):
        runs.of(samples[1])


@pytest.mark.parametrize(("count", "most", "expected"), [
    (1, 5, [0]), (3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (4, 1, [0])
])
def test_some_of_many_are_spread_evenly(count, most, expected):
    assert explanations.spread(count, most) == expected
