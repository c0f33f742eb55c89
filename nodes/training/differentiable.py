"""What ComfyUI's modules lack for a backward pass, added to them for the length of a `with` block."""

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.text_encoders.t5
import torch

# Modules whose input the layers of ComfyUI's encoders later add to in place.
_NORMS = (torch.nn.LayerNorm, comfy.text_encoders.t5.T5LayerNorm)


@contextlib.contextmanager
def host_in_training() -> Iterator[None]:
    """ComfyUI chooses kernels that have a backward pass."""
    with _training_flag(True):
        yield


@contextlib.contextmanager
def no_training() -> Iterator[None]:
    """Inference inside a running session, for a preview."""
    with _training_flag(False), torch.no_grad():
        yield


@contextlib.contextmanager
def _training_flag(value: bool) -> Iterator[None]:
    before = comfy.model_management.in_training
    comfy.model_management.in_training = value
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def frozen_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Parameters and buffers as tensors that autograd may save, sharing their memory; afterwards the same objects."""
    replaced: list[tuple[dict, str, torch.Tensor]] = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    # Subclasses (quantised, GGUF-like) unpack into new tensors in their forward. All others are
                    # replaced: a tensor that ComfyUI moved between devices hides that it was made in inference mode.
                    if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                        continue
                    plain = _alias(tensor)
                    if tensors is module._parameters:
                        plain = torch.nn.Parameter(plain, requires_grad=False)
                    replaced.append((tensors, name, tensor))
                    tensors[name] = plain
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a new tensor: one that was made in inference mode can never be saved for a gradient."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def outside_inference(value: Any) -> Any:
    """A tensor, or each in a list, as a copy that autograd may save."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(outside_inference(part) for part in value)
    return value


@contextlib.contextmanager
def copied_norm_inputs(model: torch.nn.Module) -> Iterator[None]:
    """Norms read copies: ComfyUI's encoders add in place to their input, which a gradient needs as it was."""
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, _NORMS):
                handles.append(module.register_forward_pre_hook(lambda _module, args: (args[0].clone(), *args[1:])))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def streamed_layers(model: torch.nn.Module, trained: bool = False) -> Iterator[None]:
    """Layers compute again in the backward pass, with weights that stream in again: none is kept for it meanwhile.

    Weights that stream in share buffers, so one that autograd kept would be overwritten. `trained` if the weights
    themselves get gradients.
    """
    # ComfyUI's own for a layer of one input; this module is large, and part of ComfyUI's nodes.
    from comfy_extras.nodes_train import OffloadCheckpointFunction

    def again(forward):
        return lambda x, *args, **kwargs: OffloadCheckpointFunction.apply(x, lambda y: forward(y, *args, **kwargs))

    originals = []
    try:
        for module in model.modules():
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                originals.append((module, module.__dict__.get("forward")))
                # ComfyUI's is blind to weights where a layer's input has no gradient, as the first one's.
                one_input = not trained and isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
                module.forward = again(module.forward) if one_input else _recomputing(module.forward)
        yield
    finally:
        for module, original in originals:
            del module.forward
            if original is not None:
                module.forward = original


@contextlib.contextmanager
def copied_activations() -> Iterator[None]:
    """What a backward pass needs of activations is copied: some networks add in place to all that they have read."""
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.grad_fn is not None else tensor  # weights stay

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda tensor: tensor):
        yield


@contextlib.contextmanager
def checkpointed_blocks(network: torch.nn.Module, on_copies: bool = False) -> Iterator[None]:
    """Blocks save their inputs only and compute again in the backward pass; `on_copies` if they work in place."""
    originals = []
    try:
        for block in _blocks(network):
            originals.append((block, block.__dict__.get("forward")))
            block.forward = _recomputing(_on_a_copy(block.forward) if on_copies else block.forward)
        yield
    finally:
        for block, original in originals:
            del block.forward
            if original is not None:
                block.forward = original


def _on_a_copy(forward):
    def on_copies(*args, **kwargs):
        return forward(*(_copied_tokens(a) for a in args), **{key: _copied_tokens(a) for key, a in kwargs.items()})

    return on_copies


def _copied_tokens(value: Any) -> Any:
    """A copy of what a block may add to: tokens [B, N, C] or [B, T, H, W, C]; others as they are."""
    return value.clone() if isinstance(value, torch.Tensor) and value.ndim in (3, 5) else value


def _recomputing(forward):
    def checkpointed(*args, **kwargs):
        # The model writes each block's index into these options as it goes: each block gets a copy.
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        kwargs = {key: dict(a) if isinstance(a, dict) else a for key, a in kwargs.items()}
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks: members of the network's lists, or one level further down where those are sequences."""
    blocks = []
    for child in network.children():
        members = list(child) if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential) else []
        for member in members:
            inner = list(member) if isinstance(member, torch.nn.Sequential | torch.nn.ModuleList) else [member]
            blocks.extend(module for module in inner if any(True for _ in module.parameters()))
    return blocks
