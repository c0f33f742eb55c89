"""Attention of video tokens to themselves and to reference images, which attend only to themselves.

Source: Stand-In (arXiv 2508.07901), restricted self-attention. The weights and the second and later references
are ours.

Notation. Q_V, K_V, V_V belong to the N video tokens, Q_I, K_I, V_I to the R tokens of one reference image; queries
and keys already carry their rotary positions. Everything is [B, T, H, D]: batch, tokens, heads, head width.

    Out_I = Attn(Q_I, K_I, V_I)                              a reference sees neither video nor another reference
    Out_V = Attn(Q_V, [K_V; K_I], [V_V; V_I])

A weight w >= 0 for each video token multiplies the reference's unnormalised attention, which is the same as
adding log w to its scores: 1 is the published method, 0 gives exactly Attn(Q_V, K_V, V_V), and above 1 the
reference counts more.

Two forms of Out_V:
- `joint` is the fast path for weights of 1: keys and values go into buffers of N + R rows, and the caller's
  attention function runs on them once.
- `weighted` merges segments by their log-sum-exp l: with g = sigmoid(l_I + log w - l_V) the result is
  Out_V + g (Out_I' - Out_V), where Out_I' = Attn(Q_V, K_I, V_I). It is exact, needs no N x (N + R) mask, and
  costs one more small attention for each reference. It saves nothing, so it runs only where a weight is not 1.

There is no Triton form: one is added once it is measured to be faster on a GPU, and none was available.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# attention(q, k, v) -> out, all [B, T, H, D], one softmax over the keys
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Queries merged at once, and fp32 scores held at once; these limit the memory and do not change the result.
_ROWS = 4096
_SCORES = 1 << 26


class Reference(NamedTuple):
    """Keys and values of one reference, [B or 1, R, H, D], and its weight for each video token, [N] or [B, N].

    [1] is one weight for all of them, and None a weight of 1.
    """

    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor | None = None


def joint(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, references: Sequence[Reference], attention: Attention
) -> torch.Tensor:
    """Out_V by one call of `attention` on one buffer of keys and one of values.

    Without references this is attention(q, k, v) itself. Raises ValueError for a reference with a weight.
    """
    if not references:
        return attention(q, k, v)
    if any(reference.weight is not None for reference in references):
        raise ValueError("joint() takes no weights, and a reference has one: use weighted()")
    return attention(q, append(k, [r.k for r in references]), append(v, [r.v for r in references]))


def append(rows: torch.Tensor, tails: Sequence[torch.Tensor]) -> torch.Tensor:
    """One new buffer [B, N + sum of R, ...] of rows [B, N, ...] and tails [B or 1, R, ...], each written once."""
    count = rows.shape[1]
    total = count + sum(tail.shape[1] for tail in tails)
    buffer = rows.new_empty((rows.shape[0], total, *rows.shape[2:]))
    buffer[:, :count] = rows
    for tail in tails:
        buffer[:, count : count + tail.shape[1]] = tail
        count += tail.shape[1]
    return buffer


def weighted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, references: Sequence[Reference]) -> torch.Tensor:
    """Out_V with a weight for each query and reference, exactly; q's shape and dtype.

    References without a weight share the video's softmax. A token whose weights are all 0 gets what the same
    backend returns without references, bit for bit.
    """
    whole = [reference for reference in references if reference.weight is None]
    if whole:
        k, v = append(k, [r.k for r in whole]), append(v, [r.v for r in whole])
    out, lse = attention_with_lse(q, k, v)
    for reference in references:
        if reference.weight is None:
            continue
        batch = (q.shape[0], -1, -1, -1)
        other, other_lse = attention_with_lse(q, reference.k.expand(batch), reference.v.expand(batch))
        out, lse = _merge(out, lse, other, other_lse + _log_weight(reference.weight, lse.dtype)[..., None])
    return out


def attention_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attn(q, k, v), [B, T, H, D], and the log-sum-exp of its scores, [B, T, H] in fp32 (fp64 for fp64)."""
    backend = lse_backend(q, k, v)
    if backend == "explicit":
        return _explicit(q, k, v)
    # PyTorch's kernels take [B, H, T, D] and return a log-sum-exp [B, H, T], longer where they pad.
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if backend == "flash_cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif backend == "flash":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out.transpose(1, 2), lse[..., : q.shape[2]].transpose(1, 2)


def lse_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Which kernel computes the log-sum-exp: flash_cpu, flash, efficient, or explicit where none of these can.

    PyTorch's kernels have no gradient through the log-sum-exp, so where one is needed this is explicit.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return "explicit"
    if q.device.type == "cpu":
        return "flash_cpu"
    if q.device.type != "cuda" or q.shape[-1] % 8 != 0:
        return "explicit"
    half = q.dtype in (torch.float16, torch.bfloat16)
    # Flash kernels need Ampere or newer; the memory-efficient one runs on every CUDA device, also in fp32.
    ampere = torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if half and q.shape[-1] <= 256 and ampere:
        return "flash"
    return "efficient" if half or q.dtype == torch.float32 else "explicit"


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _accumulator(q)
    k, v = k.to(dtype), v.to(dtype)  # once, not for each part of the queries
    outs, sums = [], []
    count = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    for rows in q.split(count, dim=1):
        scores = _scores(rows, k, dtype)
        sums.append(torch.logsumexp(scores, dim=-1).transpose(1, 2))
        outs.append(torch.einsum("bhnm,bmhd->bnhd", torch.softmax(scores, dim=-1), v).to(q.dtype))
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def _merge(out, lse, other, other_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two segments of one softmax; a second segment of weight 0 changes no bit of the first."""
    gate = torch.sigmoid(other_lse - lse)[..., None]
    parts = [
        torch.lerp(a.to(gate.dtype), b.to(gate.dtype), g).to(out.dtype)
        for a, b, g in zip(out.split(_ROWS, 1), other.split(_ROWS, 1), gate.split(_ROWS, 1), strict=True)
    ]
    return torch.cat(parts, dim=1), torch.logaddexp(lse, other_lse)


def _scores(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, M], scaled by 1 / sqrt(D)."""
    k = k.to(dtype).expand(q.shape[0], -1, -1, -1)
    return torch.einsum("bnhd,bmhd->bhnm", q.to(dtype) / math.sqrt(q.shape[-1]), k)


def _log_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """log w as [1 or B, N]; minus infinity for 0."""
    return torch.log(weight.to(dtype)).reshape(-1, weight.shape[-1])


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    # Softmax in half precision loses more than the attention kernels do, which accumulate in fp32.
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
