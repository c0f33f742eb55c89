"""Fingerprints tell two sets of weights apart, whatever their order."""

import torch
from comfy.weight_adapter import LoRAAdapter
from pack.nodes.fingerprint import patches_fingerprint, weights_fingerprint
from support import tiny_model

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


def test_patches_count_by_place_strength_and_values():
    key = "diffusion_model.blocks.0.self_attn.q.weight"

    def patched(value=1.0, strength=0.7, key=key, kind="diff", offset=None, alpha=None):
        model = tiny_model.wan()
        weight = model.model.state_dict()[key]
        patch = (kind, (torch.full_like(weight, value),))
        if alpha is not None:
            ends = torch.ones(len(weight), 2), torch.ones(2, len(weight))
            patch = LoRAAdapter(set(), (*ends, alpha, None, None, None))
        model.add_patches({key if offset is None else (key, offset): patch}, strength)
        return patches_fingerprint(model)

    assert patches_fingerprint(tiny_model.wan()) == "" and patched() == patched() and len(patched()) == 16
    others = patched(2.0), patched(strength=0.5), patched(key=key.replace("blocks.0", "blocks.1"))
    parts = patched(offset=(0, 0, 24)), patched(offset=(0, 24, 24)), patched(alpha=1.0), patched(alpha=64.0)
    assert len({patched(), patched(kind="set"), *others, *parts}) == 9
