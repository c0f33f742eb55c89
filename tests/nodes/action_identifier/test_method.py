"""Formulas and objectives of the action identifier, without ComfyUI."""

import pytest
import torch
from pack.nodes.action_identifier import method
from pack.nodes.action_identifier.method import ActionError, blended


def test_lengths_that_differ_leave_nothing_between():
    with pytest.raises(ActionError, match="set strength to 0 or 1"):
        blended(torch.zeros(1, 77, 8), torch.zeros(4, 154, 8), 0.5)
    assert blended(torch.zeros(1, 77, 8), torch.ones(4, 154, 8), 1.0).shape == (4, 154, 8)


@pytest.mark.parametrize("offsets", [
    torch.zeros(2, 1, 8), torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.full((1, 1, 8), float("nan")),
    torch.zeros(1, 1, 8, dtype=torch.int64),
], ids=["layers", "tokens", "dimensions", "not finite", "whole numbers"])
def test_offsets_fit_the_tokens(offsets):
    with pytest.raises(ActionError, match="offsets"):
        method.ActionIdentifier("<a>", "dancing", {"l": torch.zeros(1, 1, 4)}, offsets=offsets)


def test_contexts_are_trained_one_exemplar_after_the_other():
    objective = method.ContextObjective(lambda i, _generator: torch.tensor([float(i)]), 3)
    assert [float(objective(step, torch.Generator())) for step in range(5)] == [0, 1, 2, 0, 1]


def test_batches_without_triples_are_different_exemplars_drawn_by_the_step_s_generator():
    drawn = []

    def batch_loss(exemplar_ids, _generator):
        drawn.append(exemplar_ids)
        return torch.tensor([1.0, 2.0])

    objective = method.BatchObjective(batch_loss, 5, 2)
    assert [float(objective(0, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2, 3)] == [1.5] * 4
    assert drawn[0] == drawn[1] and len({tuple(ids) for ids in drawn}) > 1
    assert all(len(set(ids)) == 2 and max(ids) < 5 for ids in drawn)


def test_an_error_that_overflows_stops_the_run_though_its_gradient_does_not():
    """The other picture's, not the anchor's; its square is too large for fp32."""
    def errors(_triple, copies, _generator):
        values = copies["l"].flatten(1)
        return torch.stack([values[0].sum(), (values[1] + 1e20).square().sum(), values[2].sum()])

    token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    value = method.TripleObjective(errors, {"l": token}, 3, 0.6, "union")(0, torch.Generator().manual_seed(0))
    assert not torch.isfinite(value.detach())


def test_a_gradient_that_is_not_finite_stops_the_run_though_no_loss_says_so_and_the_mask_hides_it():
    """The contrast's alone, at a root of zero."""
    token = torch.nn.Parameter(torch.zeros(1, 1, 8))

    def errors(_triple, copies, _generator):
        values = copies["l"].flatten(1)
        return torch.stack([values[0].sum(), (2 * values[1]).sum(), values[2].sqrt().sum()])

    objective = method.TripleObjective(errors, {"l": token}, 3, 0.6, "intersection")
    value = objective(0, torch.Generator().manual_seed(0))
    assert not torch.isfinite(value.detach())
