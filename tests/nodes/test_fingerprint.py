"""Fingerprints tell two sets of weights apart, whatever their order."""

import torch
from pack.nodes.fingerprint import weights_fingerprint

WEIGHTS = {"b": torch.arange(6.0), "a": torch.ones(2, 2)}


def test_names_shapes_and_values_count_and_their_order_does_not():
    known = weights_fingerprint(WEIGHTS)
    assert weights_fingerprint(dict(reversed(WEIGHTS.items()))) == known and len(known) == 16
    for other in (
        {"c": WEIGHTS["b"], "a": WEIGHTS["a"]},
        {"b": WEIGHTS["a"].flatten(), "a": WEIGHTS["b"]},
        {**WEIGHTS, "a": torch.ones(4)},
        {**WEIGHTS, "a": torch.full((2, 2), 1.5)},
        {"b": WEIGHTS["b"]},
    ):
        assert weights_fingerprint(other) != known


def test_what_a_lora_moved_aside_stands_for_what_it_left():
    moved = {**WEIGHTS, "a": torch.zeros(2, 2)}
    assert weights_fingerprint(moved, {"a": WEIGHTS["a"]}) == weights_fingerprint(WEIGHTS)
