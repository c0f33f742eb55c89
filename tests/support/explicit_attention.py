"""Restricted attention as its formula says it, with all scores and one softmax, as the kernel's reference."""

import math

import torch


def restricted(q, k, v, references):
    """Out_V, [B, N, H, D], in fp32 (fp64 for fp64), then in q's dtype; `references` are the kernel's."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def scores(keys):
        keys = keys.to(dtype).expand(q.shape[0], -1, -1, -1)
        return torch.einsum("bnhd,bmhd->bhnm", q.to(dtype) / math.sqrt(q.shape[-1]), keys)

    columns, values = [scores(k)], [v.to(dtype)]
    for reference in references:
        weight = torch.ones(1, device=q.device) if reference.weight is None else reference.weight
        log_weight = weight.to(dtype).log().reshape(-1, 1, weight.shape[-1], 1)
        columns.append(scores(reference.k) + log_weight)
        values.append(reference.v.to(dtype).expand(q.shape[0], -1, -1, -1))
    shares = torch.softmax(torch.cat(columns, dim=-1), dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", shares, torch.cat(values, dim=1)).to(q.dtype)
