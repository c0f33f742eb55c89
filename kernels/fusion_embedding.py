"""FPDM's fusion embedding: the embeddings of a source picture and a pose become one that retrieves the target.

Source: Fusion Embedding for Pose-Guided Person Image Synthesis with Diffusion Model (arXiv 2412.07333). With e_s, e_p
and e_t the unnormalised embeddings [N, D] of source, pose and target by one image encoder:

    a = drop(relu(W_p e_p))    b = drop(relu(W_s e_s))    c = [a; b]    g = sigmoid(W_2 drop(relu(W_1 c)))
    e_f = normalise(W_o drop(relu(W_c c)) + g e_p + (1 - g) e_s)

and, with T = [e_t; e_s], F = [e_f; e_s] and S_ij = cos(T_i, F_j) / temperature over 2N rows, the source-enhanced
InfoNCE

    loss = mean_i(logsumexp_j S_ij - S_ii) + l1 mean|[e_s; e_s] - F|.
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

# The layers of the combiner in the order of the formulas: W_p, W_s, W_1, W_2, W_c, W_o.
LAYERS = ("pose_projection", "source_projection", "gate_hidden", "gate", "mixing", "output")

Drop = Callable[[torch.Tensor], torch.Tensor]


def combine(
    source: torch.Tensor, pose: torch.Tensor, weights: Mapping[str, torch.Tensor], drop: Drop | None = None
) -> torch.Tensor:
    """e_f [N, D], of unit length, for embeddings [N, D]; `weights` are `<layer>.weight` and `<layer>.bias` of LAYERS.

    `drop` is the dropout of training; without it nothing is dropped. Gradients are autograd's.
    """
    drop = drop or (lambda x: x)

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def hidden(name: str, x: torch.Tensor) -> torch.Tensor:
        return drop(functional.relu(layer(name, x)))

    projected = torch.cat([hidden("pose_projection", pose), hidden("source_projection", source)], dim=-1)
    gate = torch.sigmoid(layer("gate", hidden("gate_hidden", projected)))
    mixed = layer("output", hidden("mixing", projected))
    return functional.normalize(mixed + gate * pose + (1 - gate) * source, dim=-1)


def source_enhanced_info_nce(
    source: torch.Tensor, target: torch.Tensor, fused: torch.Tensor, temperature: float, l1: float,
    batch: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """The loss of N embeddings [N, D] of each kind, a scalar. `temperature` and `l1` have no units.

    Where the N are a part of a larger batch, `batch` is (e_s, e_f) of all its M pairs and the place of the first of
    the N; the loss is then that part's summand, so that those of all parts add up to the loss of the M pairs.
    """
    all_source, all_fused, first = batch or (source, fused, 0)
    count = len(all_source)
    t, f = torch.cat([target, source]), torch.cat([all_fused, all_source])
    similarity = functional.normalize(t, dim=-1) @ functional.normalize(f, dim=-1).T / temperature
    places = first + torch.arange(len(source), device=t.device)
    own = similarity.gather(1, torch.cat([places, count + places]).unsqueeze(1)).squeeze(1)
    contrast = (similarity.logsumexp(dim=1) - own).mean()
    distance = (torch.cat([source, source]) - torch.cat([fused, source])).abs().mean()
    return (contrast + l1 * distance) * (len(source) / count)


def retrieval_ranks(fused: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """For each e_f, how many of the N targets [N, D] are nearer than its pair's own, [N]; below 1, that one is first.

    Ours: only targets are ranked. Ties count half, so duplicate pairs still match, and embeddings that have all
    collapsed into one do not.
    """
    similarity = functional.normalize(fused, dim=-1) @ functional.normalize(target, dim=-1).T
    difference = similarity - similarity.diagonal().unsqueeze(1)
    ties = (difference.abs() <= 1e-6).sum(dim=1) - 1  # not counting the pair's own target
    return (difference > 1e-6).sum(dim=1) + ties / 2


def dropout(rate: float, generator: torch.Generator, rows: slice = slice(None), count: int | None = None) -> Drop:
    """Inverted dropout that draws from `generator`, on the CPU, at every call.

    For what are `rows` of a batch of `count`, it draws for the batch.
    """

    def drop(x: torch.Tensor) -> torch.Tensor:
        keep = (torch.rand((count or len(x), *x.shape[1:]), generator=generator) >= rate)[rows]
        return x * keep.to(x.device) / (1 - rate)

    return drop
