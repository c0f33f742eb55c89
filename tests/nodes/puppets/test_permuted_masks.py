"""The control of the action experiment: as many channels free as by the true masks, and others."""

import numpy as np
import torch
from experiments import action_identifier, cases
from experiments.action_identifier import permuted, permuted_masks, text
from pack.kernels.channel_mask import channel_mask
from pack.nodes.action_identifier import method


def gradients(seed=0, shape=(3, 2, 32)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def test_each_vector_has_as_many_channels_free_and_others():
    mask = channel_mask(*gradients(), 0.6, "intersection")
    found = permuted(mask, torch.Generator().manual_seed(0xC0))
    assert torch.equal(found.sum(-1), mask.sum(-1)) and found.dtype == torch.bool
    assert ((found != mask).any(-1)).all()
    again = permuted(mask, torch.Generator().manual_seed(0xC0))
    assert torch.equal(found, again)
    # Every vector has an order of its own.
    same = permuted(mask[:1, :1].expand_as(mask), torch.Generator().manual_seed(1))
    assert len({tuple(row.tolist()) for row in same.reshape(-1, 32)}) > 1


def objective():
    token = torch.nn.Parameter(torch.zeros(1, 1, 32))
    given = gradients(1, (1, 1, 32))

    def loss(_triple, copies, _generator):
        return torch.stack([(copies["l"][i] * given[i]).sum() for i in range(3)])

    return method.TripleObjective(loss, {"l": token}, 3, 0.6, "union"), channel_mask(*given, 0.6, "union")


def test_inside_it_a_training_gets_permuted_masks_another_at_each_step_and_outside_the_true_ones():
    made, true = objective()
    made(0, torch.Generator().manual_seed(0))
    assert torch.equal(made.masks["l"], true)
    with permuted_masks():
        steps = []
        for step in range(3):
            made(step, torch.Generator().manual_seed(0))
            steps.append(made.masks["l"])
    assert all(mask.sum() == true.sum() and not torch.equal(mask, true) for mask in steps)
    assert not torch.equal(steps[0], steps[1])
    made(0, torch.Generator().manual_seed(0))
    assert torch.equal(made.masks["l"], true)


def test_a_word_stands_where_a_named_action_would():
    take = cases.performers("saluting")[0]
    assert text(take, "<action>").count(" <action> ") == 1
    assert text(take, "").split() == text(take, "<action>").replace("<action>", "").split()


def test_what_the_exemplars_show_is_leakage_and_the_truth_has_none():
    action = "saluting"
    takes = cases.performers(action)[:3]
    assert not any(action_identifier.leaks(cases.pictures(takes), takes))
    bears = cases.pictures(cases.exemplars(action)[:3])
    assert all(action_identifier.leaks(np.ascontiguousarray(bears), takes))


def test_what_is_tested_was_among_what_development_compared():
    script = action_identifier
    for arm in (script.OURS, script.UNION, script.INTERSECTION, script.LORA):
        assert script.ARMS[arm] in script.DEVELOPMENT.values()
