"""Scores against numbers by hand, and thresholds of scores that are drawn for each case."""

import pytest
import torch
from pack.nodes.identity_check import method


def test_a_score_is_the_mean_cosine():
    references = torch.tensor([[2.0, 0, 0], [0, 3.0, 0]])
    embeddings = torch.tensor([[5.0, 0, 0], [1.0, 1, 0], [0, 0, 1.0], [-1.0, -1.0, 0]])
    expected = [0.5, 2**-0.5, 0.0, -(2**-0.5)]
    torch.testing.assert_close(method.scores(embeddings, references).tolist(), expected, rtol=0, atol=1e-12)


def test_verdicts_at_the_limits():
    thresholds = method.Thresholds(0.8, 0.6)
    assert [thresholds.verdict(score) for score in (0.8, 0.79, 0.6, 0.59)] == [
        "passed", "uncertain", "uncertain", "rejected"
    ]


def spread(low, high, count=20):
    return torch.linspace(low, high, count, dtype=torch.float64)


def test_a_gap_is_cut_in_its_middle():
    thresholds, result, doubts = method.calibrate(spread(0.7, 0.9), spread(0.1, 0.5))
    assert thresholds == pytest.approx((0.6, 0.6)) and doubts == []
    assert result == "100% of same pass and 100% of other are rejected"


def test_an_overlap_is_uncertain():
    same, other = spread(0.501, 0.901, 101), spread(0.2, 0.6, 101)
    thresholds, result, doubts = method.calibrate(same, other)
    assert thresholds == pytest.approx((0.58, 0.521)) and doubts == []
    assert result == "80% of same pass and 80% of other are rejected"
    assert (other >= thresholds.pass_above).double().mean() <= 0.06
    assert (same < thresholds.reject_below).double().mean() <= 0.06


def test_one_outlier_does_not_make_all_uncertain():
    same, other = torch.cat([spread(0.8, 0.9, 100), spread(0.1, 0.1, 1)]), spread(0.2, 0.5, 100)
    assert method.calibrate(same, other).thresholds == pytest.approx((0.643, 0.643), abs=0.01)


def test_an_encoder_that_cannot_tell_and_few_pictures_are_doubts():
    _, _, doubts = method.calibrate(spread(0.4, 0.6), spread(0.4, 0.6))
    assert len(doubts) == 1 and "same is above other in 50% of pairs only" in doubts[0]
    _, _, doubts = method.calibrate(spread(0.8, 0.9, 3), spread(0.1, 0.2, 4))
    assert doubts[0].startswith("same: 3 pictures are few") and doubts[1].startswith("other: 4 pictures are few")


@pytest.mark.parametrize(("same", "other", "edge"), [
    (spread(0.7, 0.9), None, 0.7), (None, spread(0.1, 0.5), 0.5)
])
def test_one_kind_gives_its_extreme_and_a_doubt(same, other, edge):
    thresholds, _, doubts = method.calibrate(same, other)
    assert thresholds == pytest.approx((edge, edge)) and "only" in doubts[-1]


def test_a_reference_among_the_calibration_is_found():
    references = torch.tensor([[1.0, 2, 3], [0, 1.0, 0]])
    assert method.has_copies(torch.tensor([[3.0, 2, 1], [2.0, 4, 6]]), references)
    assert not method.has_copies(torch.tensor([[3.0, 2, 1]]), references)


def test_pairs_are_compared_with_their_own_reference():
    references = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    embeddings = torch.tensor([[1.0, 1.0], [0.0, 5.0], [4.0, 3.0]])
    torch.testing.assert_close(
        method.scores(embeddings, references, paired=True), torch.tensor([0.5**0.5, 1.0, 0.96], dtype=torch.float64)
    )
    assert method.has_copies(embeddings, references, paired=True)
    assert method.scores(embeddings, references[:2], paired=True).tolist() == pytest.approx([0.5**0.5, 1.0, 0.8])
    turned = embeddings[[1, 0, 2]]
    assert method.has_copies(turned, references) and not method.has_copies(turned, references, paired=True)


def test_the_worst_group_is_first():
    texts = ["robot, day", "robot、dim", " cat,  dim ,dim\n", "cat, day,"]
    worst, *others = method.groups(texts, [0.9, 0.5, 0.1, 0.7], ["passed", "passed", "rejected", "passed"])
    assert worst[:2] == ("dim", pytest.approx(0.3)) and worst[3:] == (2, 1)
    assert worst.error == pytest.approx(0.2) and str(worst) == "dim: 0.300 ± 0.200, 1 of 2 passed"
    assert [group.name for group in others] == ["cat", "robot", "day"]
    assert method.groups([], [], []) == [] and str(method.groups(["a"], [0.5], ["x"])[0]) == "a: 0.500, 0 of 1 passed"
