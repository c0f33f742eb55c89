"""Which channels of an identifier carry its action: a comparison of three gradients.

Source: ADI (arXiv 2311.15841): g_ac is the gradient of an anchor, g_ac' that of another picture with the same action,
g_a'c that of another action in the anchor's context, all three with one noise and one noise level.
"""

import torch

MERGES = ("union", "intersection")


def channel_mask(
    anchor: torch.Tensor, same_action: torch.Tensor, same_context: torch.Tensor, percentile: float, merge: str
) -> torch.Tensor:
    """True where a channel may be updated. Gradients [..., D] of one shape, percentile in 0..1.

    Each vector of D channels has its own thresholds. `merge`, one of MERGES, says how `context_invariant` and
    `action_sensitive` are combined.
    """
    invariant = context_invariant(anchor, same_action, percentile)
    sensitive = action_sensitive(anchor, same_context, percentile)
    return _MERGE[merge](invariant, sensitive)


def context_invariant(anchor: torch.Tensor, same_action: torch.Tensor, percentile: float) -> torch.Tensor:
    """Δc = |g_ac - g_ac'| at or below its percentile: channels that another context leaves alone."""
    difference = (anchor - same_action).abs()
    return difference <= _threshold(difference, percentile)


def action_sensitive(anchor: torch.Tensor, same_context: torch.Tensor, percentile: float) -> torch.Tensor:
    """Δa = |g_ac - g_a'c| above its percentile: channels that another action changes."""
    difference = (anchor - same_context).abs()
    return difference > _threshold(difference, percentile)


def _threshold(difference: torch.Tensor, percentile: float) -> torch.Tensor:
    # fp32, since torch.quantile lacks half precision. "lower" returns a value that occurs: equal channels stay equal.
    return torch.quantile(difference.float(), percentile, dim=-1, keepdim=True, interpolation="lower")


_MERGE = {"union": torch.logical_or, "intersection": torch.logical_and}
