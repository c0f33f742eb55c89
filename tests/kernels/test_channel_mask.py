"""The channel masks against an explicit count over sorted numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from pack.kernels import channel_mask

SHAPES = [(4, 1, 16), (16, 2, 768), (1, 1, 1), (11, 3, 63)]  # layers, tokens, channels; SD 1.5 has the second


def gradients(shape, seed=0):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def reference(g, other, percentile):
    """|g - other| of each channel and its vector's threshold: the value at that rank of the sorted ones."""
    difference = np.abs(g.double().numpy() - other.double().numpy())
    rank = math.floor(percentile * (difference.shape[-1] - 1) + 1e-9)
    return difference, np.sort(difference, axis=-1)[..., rank : rank + 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", [0.01, 0.5, 0.6, 0.99])
def test_channels_below_the_context_s_and_above_the_action_s_threshold(shape, percentile):
    anchor, same_action, same_context = gradients(shape)
    context, low = reference(anchor, same_action, percentile)
    action, high = reference(anchor, same_context, percentile)
    free = channel_mask.context_invariant(anchor, same_action, percentile)
    of_it = channel_mask.action_sensitive(anchor, same_context, percentile)
    np.testing.assert_array_equal(free.numpy(), context <= low)
    np.testing.assert_array_equal(of_it.numpy(), action > high)
    merged = {
        merge: channel_mask.channel_mask(anchor, same_action, same_context, percentile, merge)
        for merge in channel_mask.MERGES
    }
    np.testing.assert_array_equal(merged["union"].numpy(), (context <= low) | (action > high))
    np.testing.assert_array_equal(merged["intersection"].numpy(), (context <= low) & (action > high))


def test_a_hand_computed_vector():
    anchor = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    same_action = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])  # differences 1 2 3 4 5, the third of five at 0.5
    same_context = torch.tensor([5.0, 4.0, -3.0, 2.0, 1.0])
    free = channel_mask.context_invariant(anchor, same_action, 0.5).tolist()
    of_it = channel_mask.action_sensitive(anchor, same_context, 0.5).tolist()
    assert (free, of_it) == ([True, True, True, False, False], [True, True, False, False, False])


@given(
    arrays.arrays(np.float32, (3, 2, 33), elements=strategies.floats(-100, 100, width=32), unique=True),
    strategies.floats(0.05, 0.9),
)
def test_shares_follow_the_percentile_and_union_holds_intersection(values, percentile):
    anchor, same_action, same_context = torch.from_numpy(values)
    free = channel_mask.context_invariant(anchor, same_action, percentile)
    higher = channel_mask.context_invariant(anchor, same_action, percentile + 0.1)
    assert (higher | ~free).all(), "a higher percentile leaves out what a lower one keeps"
    of_it = channel_mask.action_sensitive(anchor, same_context, percentile)
    assert not (channel_mask.action_sensitive(anchor, same_context, percentile + 0.1) & ~of_it).any()
    both = channel_mask.channel_mask(anchor, same_action, same_context, percentile, "intersection")
    either = channel_mask.channel_mask(anchor, same_action, same_context, percentile, "union")
    assert torch.equal(both, free & of_it) and torch.equal(either, free | of_it)
    assert (free.sum(-1) >= math.floor(percentile * 32)).all()
    assert (of_it.sum(-1) <= 33 - math.floor(percentile * 32)).all()


def test_each_vector_has_thresholds_of_its_own():
    anchor, same_action, same_context = gradients((5, 2, 40))
    alone = [
        channel_mask.channel_mask(anchor[i], same_action[i], same_context[i], 0.6, "union") for i in range(5)
    ]
    together = channel_mask.channel_mask(anchor, same_action, same_context, 0.6, "union")
    assert torch.equal(together, torch.stack(alone))
    scaled = channel_mask.channel_mask(anchor * 1000, same_action * 1000, same_context * 1000, 0.6, "union")
    assert torch.equal(scaled, together), "a step's loss weight would decide what is learned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_type(dtype):
    mask = channel_mask.channel_mask(*gradients((2, 1, 64)).to(dtype), 0.6, "intersection")
    assert mask.dtype == torch.bool and 0 < mask.sum() < mask.numel()


def test_gradients_that_are_all_equal_move_by_the_context_alone():
    same = torch.ones(2, 1, 8)
    assert channel_mask.context_invariant(same, same, 0.6).all()
    assert not channel_mask.action_sensitive(same, same, 0.6).any()
