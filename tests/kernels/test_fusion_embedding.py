"""The combiner and its loss against plain loops over numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.kernels import fusion_embedding
from pack.nodes.fusion_embedding import layout


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(width=6, projection=5, hidden=4, seed=0):
    initial = layout.new_combiner(width, projection, hidden, torch.Generator().manual_seed(seed))
    return {key: value.double() for key, value in initial.items()}


def published(source, pose, w):
    """METHODS' formulas, one picture and one number at a time."""

    def affine(name, x):
        matrix, bias = w[f"{name}.weight"].tolist(), w[f"{name}.bias"].tolist()
        return [sum(m * v for m, v in zip(row, x, strict=True)) + b for row, b in zip(matrix, bias, strict=True)]

    def relu(x):
        return [max(0.0, v) for v in x]

    vectors = []
    for e_s, e_p in zip(source.tolist(), pose.tolist(), strict=True):
        a, b = relu(affine("pose_projection", e_p)), relu(affine("source_projection", e_s))
        c = a + b
        (logit,) = affine("gate", relu(affine("gate_hidden", c)))
        sigma = 1 / (1 + math.exp(-logit))
        mixed = affine("output", relu(affine("mixing", c)))
        e_f = [m + sigma * p + (1 - sigma) * s for m, p, s in zip(mixed, e_p, e_s, strict=True)]
        length = math.sqrt(sum(v * v for v in e_f))
        vectors.append([v / length for v in e_f])
    return torch.tensor(vectors, dtype=torch.float64)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_the_combiner_is_the_published_formula(count, width, projection, hidden, seed):
    w = weights(width, projection, hidden, seed)
    source, pose = 3 * random(seed + 1, count, width), 3 * random(seed + 2, count, width)
    actual = fusion_embedding.combine(source, pose, w)
    torch.testing.assert_close(actual, published(source, pose, w), rtol=0, atol=1e-12)
    single = fusion_embedding.combine(source.float(), pose.float(), {k: v.float() for k, v in w.items()})
    torch.testing.assert_close(single.double(), actual, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(count, dtype=torch.float64))


def test_two_numbers_by_hand():
    """W_o is 0 and the gate is sigmoid(0): the mean of pose and source, at unit length."""
    w = {key: torch.zeros_like(value) for key, value in weights(2).items()}
    actual = fusion_embedding.combine(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 8.0]]), _single(w))
    torch.testing.assert_close(actual, torch.tensor([[0.6, 0.8]]))
    w["gate.bias"] = torch.tensor([math.log(3.0)])  # sigmoid is 3/4, of the pose
    actual = fusion_embedding.combine(torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]]), _single(w))
    torch.testing.assert_close(actual, torch.tensor([[1.0, 3.0]]) / 10**0.5)


def _single(w):
    return {key: value.float() for key, value in w.items()}


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.05, 1.0), st.integers(0, 1000))
def test_the_loss_is_the_published_formula(count, width, temperature, seed):
    source, target, fused = (2 * random(seed + i, count, width).numpy() for i in range(3))
    wanted, actual = np.concatenate([target, source]), np.concatenate([fused, source])
    total = 0.0
    for i, t in enumerate(wanted):
        row = [t @ f / (np.linalg.norm(t) * np.linalg.norm(f) * temperature) for f in actual]
        total += math.log(sum(math.exp(v - max(row)) for v in row)) + max(row) - row[i]
    expected = total / len(wanted) + 0.3 * np.abs(np.concatenate([source, source]) - actual).mean()
    loss = fusion_embedding.source_enhanced_info_nce(
        *(torch.from_numpy(x) for x in (source, target, fused)), temperature, 0.3
    )
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_the_loss_is_least_where_each_finds_its_own():
    target, source = torch.eye(6)[:3], torch.eye(6)[3:]
    right = fusion_embedding.source_enhanced_info_nce(source, target, target, 0.07, 0.0)
    wrong = fusion_embedding.source_enhanced_info_nce(source, target, target.roll(1, 0), 0.07, 0.0)
    copied = fusion_embedding.source_enhanced_info_nce(source, target, source, 0.07, 0.0)
    assert right < 1e-3 < wrong and right < copied


@given(st.integers(2, 8), st.integers(0, 1000))
def test_ranks_are_places_in_a_sorted_list(count, seed):
    fused, target = random(seed, count, 3), random(seed + 1, count, 3)
    ranks = fusion_embedding.retrieval_ranks(fused, target).tolist()
    for i, row in enumerate(torch.cosine_similarity(fused[:, None], target[None], dim=-1).tolist()):
        assert sorted(range(count), key=lambda j: -row[j]).index(i) == ranks[i]


def test_equal_targets_count_half():
    target = torch.eye(3)[[0, 0, 1]]
    assert fusion_embedding.retrieval_ranks(target, target).tolist() == [0.5, 0.5, 0]
    assert fusion_embedding.retrieval_ranks(target.roll(1, 0), target).tolist() == [1.5, 0.5, 2]
    collapsed = torch.ones(48, 5)
    assert fusion_embedding.retrieval_ranks(collapsed, collapsed).min() > 20


def test_dropout_keeps_the_mean_and_repeats_with_its_generator():
    x = torch.ones(200, 500)
    drop = fusion_embedding.dropout(0.3, torch.Generator().manual_seed(1))
    first, second = drop(x), drop(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert first.mean() == pytest.approx(1.0, abs=0.01) and not torch.equal(first, second)
    assert torch.equal(fusion_embedding.dropout(0.3, torch.Generator().manual_seed(1))(x), first)


def test_every_place_of_dropout_is_used_and_none_without_it():
    """Four of the formula's layers are dropped, and nothing else."""
    shapes = []

    def record(x):
        shapes.append(tuple(x.shape))
        return x

    w, source, pose = weights(), random(1, 2, 6), random(2, 2, 6)
    plain = fusion_embedding.combine(source, pose, w)
    assert torch.equal(fusion_embedding.combine(source, pose, w, record), plain)
    assert sorted(shapes) == [(2, 4), (2, 4), (2, 5), (2, 5)]
    dropped = fusion_embedding.combine(source, pose, w, fusion_embedding.dropout(0.5, torch.Generator()))
    assert not torch.allclose(dropped, plain)
    assert torch.equal(fusion_embedding.combine(source, pose, w), plain)


def test_gradients():
    w = {key: value.requires_grad_() for key, value in weights().items()}
    source, pose, target = (random(i, 3, 6).requires_grad_() for i in range(3))

    def loss(source, pose, target, *values):
        fused = fusion_embedding.combine(source, pose, dict(zip(w, values, strict=True)))
        return fusion_embedding.source_enhanced_info_nce(source, target, fused, 0.5, 0.1)

    assert torch.autograd.gradcheck(loss, (source, pose, target, *w.values()))
