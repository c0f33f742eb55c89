"""The columns of an attention against its whole map, and that the whole map is never made."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.kernels import token_attention as kernel
from pack.kernels.token_attention import chunk_rows, token_attention

# batch, queries, tokens, heads, width, columns
SHAPES = [
    (1, 1, 1, 1, 1, [0]),
    (2, 63, 7, 3, 5, [0, 6]),
    (1, 256, 77, 8, 160, [5, 6]),  # SD 1.5 at 512 pixels, 16 x 16
    (2, 1024, 77, 20, 64, [2, 3, 40]),  # SDXL at 1024 pixels, 32 x 32
    (1, 780, 512, 2, 128, [9]),  # Wan's 512 tokens
]


def drawn(batch, queries, tokens, heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads * width, generator=generator)
    return q.to(dtype), torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)


def whole_map(q, k, heads, columns, added=None):
    """By torch's own attention, in fp64: the values mark which token each one is."""
    width = q.shape[-1] // heads
    q, k = (x.double().unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k))
    tokens = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    probabilities = torch.nn.functional.scaled_dot_product_attention(
        q, k, tokens, None if added is None else added.double()
    )
    return probabilities[..., columns].sum(-1).mean(1)


@pytest.mark.parametrize(("batch", "queries", "tokens", "heads", "width", "columns"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [
    # The inputs are rounded before both, so that only the sum's own rounding is left.
    (torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5),
])
def test_it_is_those_columns_of_the_whole_map(batch, queries, tokens, heads, width, columns, dtype, tolerance):
    q, k = drawn(batch, queries, tokens, heads, width, dtype)
    actual = token_attention(q, k, heads, columns)
    assert actual.dtype == torch.float32 and actual.shape == (batch, queries)
    torch.testing.assert_close(actual.double(), whole_map(q, k, heads, columns), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 63, 7), (2, 3, 63, 7)])
def test_a_mask_is_added_to_the_scores(shape, monkeypatch):
    q, k = drawn(2, 63, 7, 3, 5)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    added[..., 5] = -torch.inf
    expected = whole_map(q, k, 3, [2, 5], added)
    assert not torch.allclose(expected, whole_map(q, k, 3, [2, 5]), rtol=1e-2)
    for least in (kernel._LEAST_BYTES, 1):  # whole, and in chunks
        monkeypatch.setattr(kernel, "_LEAST_BYTES", least)
        actual = token_attention(q, k, 3, [2, 5], added).double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_two_tokens_by_hand():
    """One head of width 1: logits 0 and log 3 give shares 1/4 and 3/4."""
    q, k = torch.ones(1, 1, 1), torch.tensor([[[0.0], [math.log(3)]]])
    assert token_attention(q, k, 1, [1]).item() == pytest.approx(0.75)
    assert token_attention(q, k, 1, [0, 1]).item() == pytest.approx(1.0)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(1, 8), st.data())
def test_shares_of_all_columns_sum_to_one_however_it_is_cut(queries, tokens, heads, width, data):
    q, k = drawn(1, queries, tokens, heads, width, seed=data.draw(st.integers(0, 99)))
    split = data.draw(st.integers(0, tokens))
    parts = [part for part in (list(range(split)), list(range(split, tokens))) if part]
    total = sum(token_attention(5 * q, k, heads, part) for part in parts)
    torch.testing.assert_close(total, torch.ones(1, queries), rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    q, k = drawn(1, 8, 4, 2, 8)
    assert torch.isfinite(token_attention(200 * q, 200 * k, 2, [1])).all()
    assert torch.isfinite(token_attention((20 * q).half(), (20 * k).half(), 2, [1])).all()


def test_chunks_change_nothing(monkeypatch):
    q, k = drawn(2, 63, 7, 3, 5)
    whole = token_attention(q, k, 3, [2, 4])
    monkeypatch.setattr(kernel, "_LEAST_BYTES", 1)
    assert 1 <= chunk_rows(2, 63, 7, 3, 5) < 63
    torch.testing.assert_close(token_attention(q, k, 3, [2, 4]), whole, rtol=1e-6, atol=1e-7)


# batch, queries, tokens, heads, width of what is large
@pytest.mark.parametrize("shape", [(2, 16384, 77, 10, 64), (1, 32760, 512, 40, 128)])
def test_the_work_at_once_is_a_hundredth_of_the_whole_map(shape):
    batch, queries, tokens, heads, width = shape
    rows = chunk_rows(*shape)
    bytes_at_once = 4 * batch * heads * rows * (tokens + width)
    assert bytes_at_once <= max(0.01 * 4 * batch * heads * queries * tokens, 4 << 20)


def test_no_tensor_is_as_large_as_the_whole_map(monkeypatch):
    """Every tensor that is made is looked at."""
    monkeypatch.setattr(kernel, "_LEAST_BYTES", 1 << 12)
    batch, queries, tokens, heads, width = 1, 2048, 64, 4, 8
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    q, k = drawn(batch, queries, tokens, heads, width)
    with Sizes():
        token_attention(q, k, heads, [3])
    assert max(sizes) <= max(q.numel(), 0.02 * heads * queries * tokens)


@pytest.mark.parametrize("columns", [[], [7], [-1], [0, 9]])
def test_columns_that_are_not_there_are_refused(columns):
    q, k = drawn(1, 4, 7, 1, 2)
    with pytest.raises(ValueError, match="there are 7 tokens"):
        token_attention(q, k, 1, columns)
