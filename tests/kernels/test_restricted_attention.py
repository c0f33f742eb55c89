"""Against an explicit loop over queries and heads in fp64, and PyTorch's own attention under an additive mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.kernels import restricted_attention as ra
from support import explicit_attention

# (B, N, references' R, H, D); odd counts, one token, and a head of real width.
SHAPES = [
    (1, 1, (1,), 1, 2),
    (2, 7, (3,), 2, 4),
    (1, 63, (17, 5), 3, 8),
    (3, 10, (4, 4, 1), 2, 16),
    (1, 96, (64,), 2, 128),  # heads of Wan 14B, whose video has 32,760 tokens and whose reference 1,024
]
shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 3), st.integers(1, 6),
)
seeds = st.integers(0, 2**31 - 1)
# fp32: rounding of two orders of summation. Half precision: of the output, and of P @ V inside the kernel.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(seed, shape, dtype=torch.float64, shared=False):
    batch, count, sizes, heads, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(b, rows):
        return torch.randn(b, rows, heads, width, generator=generator, dtype=torch.float64).to(dtype)

    video = [draw(batch, count) for _ in range(3)]
    return video, [(draw(1 if shared else batch, rows), draw(1 if shared else batch, rows)) for rows in sizes]


def weights(seed, count, number, batch=None):
    """Weights with exact zeros and ones among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if batch is None else (batch, count)
    drawn = [torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3 for _ in range(number)]
    return [w.clamp(0, 1) for w in drawn]


def by_hand(q, k, v, references):
    """One query and head at a time: exp of every score, weighted, over their sum."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for h in range(q.shape[2]):
                segments = [(k[b, :, h], v[b, :, h], 1.0)]
                for rows_k, rows_v, w in references:
                    row = min(b, rows_k.shape[0] - 1)
                    factor = 1.0 if w is None else float(w[n] if w.ndim == 1 else w[b, n])
                    segments.append((rows_k[row, :, h], rows_v[row, :, h], factor))
                total, mixed = 0.0, torch.zeros(q.shape[-1], dtype=q.dtype)
                for keys, values, factor in segments:
                    for key, value in zip(keys, values, strict=True):
                        share = factor * math.exp(float(q[b, n, h] @ key) / math.sqrt(q.shape[-1]))
                        total += share
                        mixed += share * value
                out[b, n, h] = mixed / total
    return out


def masked(q, k, v, references):
    """PyTorch's attention over all keys, with log w as an additive mask."""
    batch, count = q.shape[:2]
    bias = [torch.zeros(batch, 1, count, count, dtype=q.dtype)]
    for keys, _, weight in references:
        w = torch.ones(count, dtype=q.dtype) if weight is None else weight.to(q.dtype)
        bias.append(w.log().reshape(-1, 1, count, 1).expand(batch, 1, count, keys.shape[1]))
    k = torch.cat([k] + [r.k.expand(batch, -1, -1, -1) for r in references], 1)
    v = torch.cat([v] + [r.v.expand(batch, -1, -1, -1) for r in references], 1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat(bias, -1)).transpose(1, 2)


def sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def close(ours, reference, dtype=torch.float64):
    torch.testing.assert_close(ours.double(), reference.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_two_tokens_by_hand():
    """One video and one reference token, scores 0: the reference's share is w / (1 + w)."""
    q = torch.zeros(1, 1, 1, 2)
    k, v = torch.ones(1, 1, 1, 2), torch.tensor([0.0, 8.0]).reshape(1, 1, 1, 2)
    image = torch.tensor([4.0, 0.0]).reshape(1, 1, 1, 2)
    for w, expected in ((1.0, (2.0, 4.0)), (1 / 3, (1.0, 6.0)), (0.0, (0.0, 8.0))):
        reference = ra.Reference(k, image, torch.tensor([w]))
        for form in (explicit_attention.restricted, ra.weighted):
            torch.testing.assert_close(form(q, k, v, [reference]).flatten(), torch.tensor(expected))


@settings(max_examples=30)
@given(shapes, seeds, st.booleans(), st.booleans())
def test_definition_and_weighted_are_the_loop(shape, seed, shared, per_batch):
    (q, k, v), pairs = tensors(seed, shape, shared=shared)
    drawn = weights(seed, shape[1], len(pairs), shape[0] if per_batch else None)
    references = [ra.Reference(*pair, w) for pair, w in zip(pairs, drawn, strict=True)]
    expected = by_hand(q, k, v, references)
    close(explicit_attention.restricted(q, k, v, references), expected)
    close(ra.weighted(q, k, v, references), expected)
    close(masked(q, k, v, references), expected)


@settings(max_examples=30)
@given(shapes, seeds)
def test_joint_is_the_loop_without_weights(shape, seed):
    (q, k, v), pairs = tensors(seed, shape, shared=True)
    references = [ra.Reference(*pair) for pair in pairs]
    expected = by_hand(q, k, v, references)
    close(ra.joint(q, k, v, references, sdpa), expected)
    close(ra.weighted(q, k, v, references), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_in_every_dtype(shape, dtype):
    (q, k, v), pairs = tensors(5, shape, dtype)
    drawn = weights(6, shape[1], len(pairs))
    references = [ra.Reference(*pair, w) for pair, w in zip(pairs, drawn, strict=True)]
    exact = [ra.Reference(*(t.double() for t in pair), w) for pair, w in zip(pairs, drawn, strict=True)]
    expected = masked(q.double(), k.double(), v.double(), exact)
    for result in (explicit_attention.restricted(q, k, v, references), ra.weighted(q, k, v, references)):
        assert result.dtype == dtype and result.shape == q.shape
        close(result, expected, dtype)
    plain = [ra.Reference(*pair) for pair in pairs]
    whole = masked(q.double(), k.double(), v.double(), [r._replace(weight=None) for r in exact])
    close(ra.joint(q, k, v, plain, sdpa), whole, dtype)


@settings(max_examples=30)
@given(shapes, seeds)
def test_mixed_whole_and_weighted_references(shape, seed):
    (q, k, v), pairs = tensors(seed, shape)
    drawn = weights(seed + 1, shape[1], len(pairs))
    drawn[0] = None
    references = [ra.Reference(*pair, w) for pair, w in zip(pairs, drawn, strict=True)]
    close(ra.weighted(q, k, v, references), by_hand(q, k, v, references))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_zero_is_plain_attention_bit_for_bit(shape, dtype):
    (q, k, v), pairs = tensors(7, shape, dtype)
    zero = torch.zeros(shape[1])
    plain = ra.attention_with_lse(q, k, v)[0]
    assert torch.equal(ra.weighted(q, k, v, [ra.Reference(*pair, zero) for pair in pairs]), plain)
    # Token by token: only those with a weight change.
    half = zero.clone()
    half[::2] = 1
    result = ra.weighted(q, k, v, [ra.Reference(*pairs[0], half)])
    assert torch.equal(result[:, 1::2], plain[:, 1::2]) and not torch.equal(result[:, ::2], plain[:, ::2])
    assert torch.equal(ra.weighted(q, k, v, []), plain)


@settings(max_examples=30)
@given(seeds)
def test_regions_keep_references_apart(seed):
    """A token sees the reference of its own region and nothing of the other."""
    (q, k, v), pairs = tensors(seed, (2, 8, [3, 4], 2, 4))
    left = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    both = ra.weighted(q, k, v, [ra.Reference(*pairs[0], left), ra.Reference(*pairs[1], 1 - left)])
    for pair, rows in zip(pairs, (slice(0, 4), slice(4, 8)), strict=True):
        close(both[:, rows], explicit_attention.restricted(q, k, v, [ra.Reference(*pair)])[:, rows])


@settings(max_examples=30)
@given(shapes, seeds)
def test_the_order_of_references_does_not_matter(shape, seed):
    (q, k, v), pairs = tensors(seed, shape)
    drawn = weights(seed, shape[1], len(pairs))
    references = [ra.Reference(*pair, w) for pair, w in zip(pairs, drawn, strict=True)]
    close(ra.weighted(q, k, v, references), ra.weighted(q, k, v, references[::-1]))


def test_the_published_layer_in_one_piece():
    """One softmax over [video; image] rows under the mask that forbids images to see the video."""
    (q, k, v), [(k_i, v_i)] = tensors(3, (2, 6, [4], 2, 8))
    q_i = torch.randn(2, 4, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    allowed = torch.ones(10, 10, dtype=torch.bool)
    allowed[6:, :6] = False
    rows = [torch.cat(pair, 1).transpose(1, 2) for pair in ((q, q_i), (k, k_i), (v, v_i))]
    whole = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=allowed).transpose(1, 2)
    close(explicit_attention.restricted(q, k, v, [ra.Reference(k_i, v_i)]), whole[:, :6])
    close(explicit_attention.restricted(q_i, k_i, v_i, []), whole[:, 6:])


def test_joint_calls_the_given_attention_once_on_one_buffer():
    (q, k, v), pairs = tensors(1, (2, 5, [3, 2], 2, 4))
    calls = []

    def attention(q, k, v):
        calls.append((k, v))
        return sdpa(q, k, v)

    ra.joint(q, k, v, [ra.Reference(*pair) for pair in pairs], attention)
    (called,) = calls
    for buffer, rows, index in zip(called, (k, v), (0, 1), strict=True):
        assert buffer.is_contiguous()
        assert torch.equal(buffer, torch.cat([rows] + [pair[index] for pair in pairs], 1))
    result = ra.joint(q, k, v, [], lambda *inputs: inputs)
    assert all(a is b for a, b in zip(result, (q, k, v), strict=True))
    with pytest.raises(ValueError, match="weighted"):
        ra.joint(q, k, v, [ra.Reference(*pairs[0], torch.ones(5))], attention)


def test_large_scores_do_not_overflow():
    (q, k, v), pairs = tensors(2, (1, 4, [3], 1, 4), torch.float32)
    references = [ra.Reference(pairs[0][0] * 300, pairs[0][1], torch.tensor([1.0, 0.5, 1e-30, 0.0]))]
    result = ra.weighted(q * 300, k, v, references)
    assert torch.isfinite(result).all()
    exact = [ra.Reference(references[0].k.double(), references[0].v.double(), references[0].weight)]
    torch.testing.assert_close(
        result.double(), masked(q.double() * 300, k.double(), v.double(), exact), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rows", [1, 3, 4096])
def test_explicit_log_sum_exp_and_any_chunk(monkeypatch, rows):
    monkeypatch.setattr(ra, "_ROWS", rows)
    monkeypatch.setattr(ra, "_SCORES", rows * 2 * 2 * 7)
    (q, k, v), pairs = tensors(4, (2, 7, [3], 2, 4))
    for result, reference in zip(ra._explicit(q, k, v), ra.attention_with_lse(q, k, v), strict=True):
        close(result, reference)
    references = [ra.Reference(*pairs[0], weights(1, 7, 1)[0])]
    close(ra.weighted(q, k, v, references), explicit_attention.restricted(q, k, v, references))


@pytest.mark.parametrize("form", ["joint", "weighted"])
def test_gradients(form):
    (q, k, v), pairs = tensors(9, (1, 3, [2], 1, 2))
    weight = None if form == "joint" else torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)

    def run(q, k, v, k_i, v_i):
        references = [ra.Reference(k_i, v_i, weight)]
        if form == "joint":
            return ra.joint(q, k, v, references, lambda *t: explicit_attention.restricted(*t, []))
        return ra.weighted(q, k, v, references)

    leaves = [t.clone().requires_grad_() for t in (q, k, v, *pairs[0])]
    assert ra.lse_backend(*leaves[:3]) == "explicit"
    assert torch.autograd.gradcheck(run, leaves)
