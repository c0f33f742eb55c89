"""Muon for hidden weight matrices and kernels, AdamW for the rest, both as PyTorch has them.

Measured on one CPU core with bf16, a step on all matrices: the UNet's 117 take torch.optim.Muon 59 ms, and our own
earlier one, which orthogonalises matrices of one shape together in fp32, 130 ms; the autoencoder's 66 take 26 and
55 ms. Beside a UNet step of 545 ms PyTorch's is the better one to keep.
"""

from collections.abc import Iterable, Sequence

import torch

SMALLEST_SIDE = 8  # of a matrix that Muon trains


class KernelMuon(torch.optim.Muon):
    """torch.optim.Muon for weights [out, ...] of any rank, through views [out, n] of their storage."""

    def __init__(self, weights: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0):
        self.weights = list(weights)
        views = [torch.nn.Parameter(_as_matrix(weight.data, weight)) for weight in self.weights]
        if any(view.data_ptr() != weight.data_ptr() for view, weight in zip(views, self.weights, strict=True)):
            raise ValueError("a weight has a memory layout of which no matrix is a view: make it contiguous")
        super().__init__(views, lr=lr, weight_decay=weight_decay)

    def step(self, closure=None):
        """One step down the gradients of `weights`."""
        for view, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            view.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
        return super().step(closure)


def _as_matrix(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[out, n] in the element order of `like`, which is contiguous or channels-last."""
    if like.ndim > 3 and not like.is_contiguous():
        tensor = tensor.movedim(1, -1)
    return tensor.flatten(1)


def split_parameters(
    module: torch.nn.Module, outer: Sequence[str]
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """What Muon trains and what AdamW trains, of the parameters that want a gradient.

    Embeddings, and layers whose name contains one of `outer`, are no hidden matrices; Muon's author leaves them to
    AdamW (Jordan 2024).
    """
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim in (2, 4, 5) and min(parameter.shape[:2]) > SMALLEST_SIDE
        hidden = hidden and "embedding" not in name and not any(part in name for part in outer)
        (matrices if hidden else others).append(parameter)
    return matrices, others
