"""Explain Result on video identity: shares against a softmax by the definition, steps, windows, and at rest."""

import pytest
import torch
from pack.nodes import explanations
from pack.nodes.explain.nodes import UnderstudyExplain
from pack.nodes.patching import models
from pack.nodes.video_identity import explaining, sampling
from support import video_identities
from support.video_identities import MODEL, SHAPE, call, draw, person, sample, shown, window


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(explanations, "is_asked", lambda: True)


def shares(model):
    """What the only remembered run recorded."""
    (recorded,) = models.attachment(model, sampling.KEY).explained._records.values()
    return recorded


def defined(x, people, strength, block):
    """The references' shares of each token in a block, [references, N], by one softmax over all keys."""
    kvs = []
    for one in people:
        model = shown(MODEL, one)
        call(model, x, cleanup=False)
        cache = models.attachment(model, sampling.KEY).cache
        kvs.append(video_identities.cached_kv(cache))
        cache.clear()
    seen = []

    def attention(function, q, k, v, heads, **kwargs):
        seen.append((q, k, heads))
        return function(q, k, v, heads, **kwargs)

    # Blocks before this one see the references, as in the run that is explained.
    model = shown(MODEL, *people)
    original = sampling.blocks.RestrictedAttention.__call__

    def spying(self, function, q, k, v, heads, *args, **kwargs):
        if self.uses == 0:
            seen.append((q.clone(), k.clone(), heads))
        return original(self, function, q, k, v, heads, *args, **kwargs)

    sampling.blocks.RestrictedAttention.__call__ = spying
    try:
        call(model, x)
    finally:
        sampling.blocks.RestrictedAttention.__call__ = original
    q, k, heads = seen[block]
    q, k = (t.unflatten(-1, (heads, -1)).double() for t in (q, k))
    scores = [torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5]
    for kv in kvs:
        keys = kv[block][0].double().expand(len(q), -1, -1, -1)
        score = torch.einsum("bnhd,bmhd->bhnm", q, keys) / q.shape[-1] ** 0.5
        scores.append(score + torch.log(torch.tensor(strength, dtype=torch.float64)))
    weights = torch.cat(scores, -1).softmax(-1)
    ends = torch.tensor([score.shape[-1] for score in scores]).cumsum(0).tolist()
    return torch.stack([weights[..., a:b].sum(-1).mean((0, 1)) for a, b in zip(ends, ends[1:])])


@pytest.mark.parametrize(("count", "strength"), [(1, 1.0), (2, 1.0), (2, 0.5)])
def test_a_share_is_the_references_part_of_the_softmax(asked, count, strength):
    x = draw(2, *SHAPE)
    people = [person(seed=i + 1, strength=strength) for i in range(count)]
    run = models.attachment(shown(MODEL, *people), sampling.KEY)
    model = shown(MODEL, *people)
    run = models.attachment(model, sampling.KEY)
    run._shares = explaining.Shares()
    call(model, x, options={"cond_or_uncond": [0]})
    tables = run._shares.tables()
    assert list(tables) == list(range(count))
    for block in range(3):
        expected = defined(x, people, strength, block)
        for number, (steps, blocks, values) in tables.items():
            assert steps == [0] and blocks == [0, 1, 2]
            torch.testing.assert_close(
                values[0, block].flatten().double(), expected[number], rtol=1e-4, atol=1e-5
            )


def test_only_the_positive_counts(asked):
    """In one call with both, and in calls of their own."""
    x = draw(2, *SHAPE)
    context = draw(9, 1, 4, 16), draw(8, 1, 4, 16)
    recorded = []
    for rows, entries in (((0,), [0]), ((0, 1), [0, 1]), ((1, 0), [1, 0])):
        model = shown()
        run = models.attachment(model, sampling.KEY)
        run._shares = explaining.Shares()
        call(model, x.expand(len(rows), -1, -1, -1, -1), context=torch.cat([context[i] for i in rows]),
             options={"cond_or_uncond": entries})
        recorded.append(run._shares.tables()[0][2])
    for other in recorded[1:]:
        torch.testing.assert_close(other, recorded[0], rtol=1e-4, atol=1e-6)
    run._shares = explaining.Shares()
    call(model, x, options={"cond_or_uncond": [1]})
    assert run._shares.tables() == {}


def test_a_run_has_a_row_for_each_step_and_nothing_changes(asked, monkeypatch):
    model = shown(start_percent=0.0, end_percent=0.7)
    samples = sample(model, steps=4)
    steps, blocks, values = shares(model).tables()[0]
    assert steps == [0, 1, 2] and blocks == [0, 1, 2] and values.shape == (3, 3, 3, 4, 3)
    assert 0 < values.min() and values.max() < 1
    monkeypatch.setattr(explanations, "is_asked", lambda: False)
    silent = shown(start_percent=0.0, end_percent=0.7)
    assert torch.equal(sample(silent, steps=4), samples), "recording changes no bit"
    with pytest.raises(ValueError, match="samples are not what this model's sampler made"):
        UnderstudyExplain.execute(silent, {"samples": samples})


def test_nothing_is_computed_unless_asked(monkeypatch):
    def refuse(*_args):
        raise AssertionError("recorded though nobody asked")

    monkeypatch.setattr(explaining, "attention_with_lse", refuse)
    sample(shown(), steps=2)


def test_windows_of_frames_are_put_in_their_places(asked):
    model = shown()
    run = models.attachment(model, sampling.KEY)
    run._shares, run._size = explaining.Shares(), (4, 8, 6)
    whole = draw(2, 1, 16, 4, 8, 6)
    for frames in ([0, 1], [2, 3], [1, 2]):
        options = {"cond_or_uncond": [0], "context_window": window(frames, 4)}
        call(model, whole[:, :, frames], options=options, cleanup=False)
    (sums, counts), *_ = run._shares._sums.values()
    assert counts.flatten().tolist() == [1, 2, 2, 1] and (sums > 0).all()


def test_large_frames_are_measured_on_a_grid():
    places, size = explaining._places((2, 30, 52))
    assert size == (7, 12) and len(places) == 2 * 84 and len(set(places.tolist())) == len(places)
    assert places[0] == 0 and places[-1] == 2 * 30 * 52 - 1 and places[84] == 30 * 52
    assert explaining._places((1, 4, 3))[1] == (4, 3)


def test_the_node_says_where_and_what_it_cost(asked):
    model = shown()
    samples = sample(model, steps=2)
    image, text = UnderstudyExplain.execute(model, {"samples": samples}).result
    values = shares(model).tables()[0][2]
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[-1] == 3 and image.shape[2] >= 640
    assert f"the reference has {float(values.mean()):.1%} of the frames' attention" in text
    assert "12 of 12 places of each frame were computed again" in text and "100% more self-attention" in text
    with pytest.raises(ValueError, match="model has nothing to explain"):
        UnderstudyExplain.execute(MODEL, {"samples": samples})


def test_a_reference_that_never_acted_is_said(asked):
    model = shown(start_percent=0.0001, end_percent=0.0002)
    samples = sample(model, steps=2)
    with pytest.raises(ValueError, match="set start_percent and end_percent"):
        UnderstudyExplain.execute(model, {"samples": samples})
