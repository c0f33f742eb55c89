"""How much each query attends to a few tokens: those columns of an attention's probabilities, never the full map.

For queries q, keys k and heads h: P = softmax(q kᵀ / √D), and the result is the mean over h of the sum of P over the
given columns. Cross-attention from the positions of a picture to the words for a subject shows where the subject is
(Hertz et al., arXiv 2208.01626).
"""

from collections.abc import Sequence

import torch

# Bytes of a chunk of queries: a hundredth of the full map in fp32, but at least so many, or kernel launches dominate.
_SHARE = 100
_LEAST_BYTES = 4 << 20


def token_attention(
    q: torch.Tensor, k: torch.Tensor, heads: int, columns: Sequence[int], added: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of `columns` in what each query attends to, [B, N] in 0..1, fp32.

    q: [B, N, H * D] and k: [B, M, H * D] as they go into the attention, of any float type; columns: indices into M;
    added: what a mask adds to the scores, [1 or B, 1 or H, 1 or N, M].
    Raises ValueError for no column, or one that k does not have.
    """
    if not columns or min(columns) < 0 or max(columns) >= k.shape[1]:
        raise ValueError(f"columns are {list(columns)}, but there are {k.shape[1]} tokens: name one or more of those")
    chosen = torch.tensor(list(columns), device=k.device)
    width = q.shape[-1] // heads
    # Upcast, since a sum of exponentials in fp16 overflows; k is short, and q comes in chunks.
    keys = k.unflatten(-1, (heads, width)).permute(0, 2, 3, 1).float() * width**-0.5
    shares = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
    rows = chunk_rows(*q.shape[:2], k.shape[1], heads, width)
    for start in range(0, q.shape[1], rows):
        part = q[:, start : start + rows].unflatten(-1, (heads, width)).transpose(1, 2).float()
        logits = part @ keys
        if added is not None:
            logits = logits + (added if added.shape[2] == 1 else added[:, :, start : start + rows]).float()
        total = logits.logsumexp(-1, keepdim=True)
        shares[:, start : start + rows] = (logits.index_select(-1, chosen) - total).exp().sum(-1).mean(1)
    return shares


def chunk_rows(batch: int, queries: int, tokens: int, heads: int, width: int) -> int:
    """How many queries are processed at once: their logits and fp32 copies stay within the limit."""
    full = 4 * batch * heads * queries * tokens
    return max(1, min(queries, max(full // _SHARE, _LEAST_BYTES) // (4 * batch * heads * (tokens + width))))
