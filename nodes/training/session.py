"""A host's MODEL, made differentiable for as long as a training lasts, and left as it was found."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.text_encoders.t5
import torch

from ..patching import models
from .config import TrainingConfig
from .whole_network import BYTES_A_WEIGHT

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Modules that read what the layers of the host's encoders then add to in place.
_NORMS = (torch.nn.LayerNorm, comfy.text_encoders.t5.T5LayerNorm)
# Ours: a backward pass keeps activations that the host's estimate for sampling does not count.
_MEMORY_FACTOR = 3


class Denoiser:
    """The loaded model as a function of noisy latents, with autograd. Made by `session`."""

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher):
        self.patcher = patcher
        self.model = patcher.model
        self.device = patcher.load_device
        self.sigmas = self.model.model_sampling.sigmas.detach().clone().float().to(self.device)

    @property
    def network(self) -> torch.nn.Module:
        return self.model.diffusion_model

    @property
    def transformer_options(self) -> dict[str, Any]:
        """A copy of the patcher's own, with an attention that has a backward pass."""
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)["transformer_options"]
        return {**options, "optimized_attention_override": _attention_with_gradient}

    def prepare(self, conditioning: list, latent: torch.Tensor) -> dict[str, Any]:
        """The model's own conditions of one CONDITIONING for latents of this shape [1, C, ...], as the host makes
        them (pooled vectors, sizes, ...), ready for `denoise`. Raises ValueError unless it has one entry.
        """
        if len(conditioning) != 1:
            raise ValueError(
                f"a caption to train on has {len(conditioning)} conditioning entries: connect one plain "
                "CLIP Text Encode for each picture, without combining or areas"
            )
        entries = comfy.sampler_helpers.convert_cond(conditioning)
        noise = torch.zeros_like(latent, device=self.device)
        # As the latent image, too: inpainting models make their mask and picture of it, here empty ones.
        processed = comfy.samplers.process_conds(
            self.model, noise, {"positive": entries}, self.device, latent_image=noise
        )
        entries = processed["positive"]
        conditions = {key: copy.copy(value) for key, value in entries[0]["model_conds"].items()}
        for condition in conditions.values():
            if hasattr(condition, "cond"):  # one without says itself, on its way to the model, what it waits for
                condition.cond = _outside_inference(condition.cond)
        return conditions

    def denoise(
        self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict],
        extra: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The denoised estimate [B, C, ...] of B latents at sigma [B], in one forward pass, in fp32.

        `extra` goes beside the patcher's own transformer_options.
        """
        batched = comfy.samplers.cond_cat(
            [{key: value.process_cond(batch_size=1, area=None) for key, value in c.items()} for c in conditions],
            device=self.device,
        )
        options = {
            **self.transformer_options, "cond_or_uncond": [0] * len(conditions), "sigmas": sigma, **(extra or {}),
        }
        return self.model.apply_model(noisy, sigma, transformer_options=options, **batched)


def _attention_with_gradient(_users_own, *args, **kwargs):
    """PyTorch's attention: others, such as SageAttention, have no backward pass, and some do not say so."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def session(
    model: comfy.model_patcher.ModelPatcher, shape: Sequence[int], config: TrainingConfig, whole: bool = False,
    beside: Sequence[comfy.model_patcher.ModelPatcher] = (), trained: int = 0,
) -> Iterator[Denoiser]:
    """Load `model` for batches of `shape` and make it differentiable; nothing of it stays when the block ends.

    Weights are neither merged nor copied. `whole` leaves room for fp32 copies of them all, and lets the model
    compute with such copies in its own type. Models `beside` it, text encoders for instance, are loaded and made
    differentiable with it. `trained` weights beside the model's own count in the memory asked for. Raises
    ValueError where a model cannot be trained through.
    """
    patcher = _trainable_clone(model, config.dtype, whole)
    # When a clone ends the host goes back to its parent: one that ends with it, in an error's frames, would leave
    # the host with a model that nobody can unload.
    while patcher.parent is not None and patcher.parent.parent is not None:
        patcher.parent = patcher.parent.parent
    required = patcher.memory_required(list(shape)) * _MEMORY_FACTOR + BYTES_A_WEIGHT * trained
    if whole:
        required += BYTES_A_WEIGHT * sum(weight.numel() for weight in patcher.model.diffusion_model.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Whole, since weights that stream in share buffers that a backward pass would find overwritten.
        comfy.model_management.load_models_gpu(
            [patcher, *beside], memory_required=required, force_full_load=True
        )
        stack.callback(patcher.cleanup)
        patcher.pre_run()
        stack.enter_context(host_in_training())
        for loaded in (patcher, *beside):
            stack.enter_context(_frozen_normal_parameters(loaded.model))
        for encoder in beside:
            stack.enter_context(_copied_inputs(encoder.model))
        if config.gradient_checkpointing:
            stack.enter_context(_checkpointed(patcher.model.diffusion_model))
        yield Denoiser(patcher)


@contextlib.contextmanager
def encoder_session(
    patcher: comfy.model_patcher.ModelPatcher, required: int, gradient_checkpointing: bool
) -> Iterator[torch.nn.Module]:
    """Load a model that is no diffusion model, an image encoder, and make it differentiable, as `session` does.

    `required` is what its activations and trained copies take, in bytes.
    """
    patcher = whole_clone(patcher)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        comfy.model_management.load_models_gpu([patcher], memory_required=required, force_full_load=True)
        stack.enter_context(host_in_training())
        stack.enter_context(_frozen_normal_parameters(patcher.model))
        stack.enter_context(_copied_inputs(patcher.model))
        if gradient_checkpointing:
            for part in list(patcher.model.modules()):
                if any(isinstance(child, torch.nn.ModuleList) for child in part.children()):
                    stack.enter_context(_checkpointed(part, copied=True))
        yield patcher.model


@contextlib.contextmanager
def _copied_inputs(model: torch.nn.Module) -> Iterator[None]:
    """Norms read copies: the host's encoders add in place to what they read, and a gradient needs that."""
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, _NORMS):
                handles.append(module.register_forward_pre_hook(lambda _module, read: (read[0].clone(), *read[1:])))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def no_training() -> Iterator[None]:
    """The host's inference state inside a running session, for a preview."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = False
    try:
        with torch.no_grad():
            yield
    finally:
        comfy.model_management.in_training = before


def whole_clone(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone that does not stream its weights. Raises ValueError where its loader cannot load it so."""
    if not model.is_dynamic():
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            "this model streams its weights and its loader cannot load it whole: start ComfyUI with "
            "--disable-dynamic-vram, or load it with Load Checkpoint or Load Diffusion Model"
        ) from error


def _trainable_clone(
    model: comfy.model_patcher.ModelPatcher, dtype: str, whole: bool
) -> comfy.model_patcher.ModelPatcher:
    patcher = whole_clone(model)
    own = patcher.model.get_dtype_inference()
    wanted = _DTYPES.get(dtype, own)
    if dtype == "model" and own == torch.float16:
        # fp16 gradients vanish; the host computes such a model in bf16 just as well.
        bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
        wanted = torch.bfloat16 if bf16 else torch.float32
    if whole or wanted != own:
        return models.with_compute_dtype(patcher, wanted)
    return patcher


@contextlib.contextmanager
def host_in_training() -> Iterator[None]:
    """The host chooses kernels with a backward pass by this flag."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def _frozen_normal_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Parameters and buffers as tensors that autograd may save, sharing their memory; the same objects after."""
    replaced: list[tuple[dict, str, torch.Tensor]] = []
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    # Subclasses (quantised, GGUF-like) unpack into new tensors in their own forward. All others,
                    # since a tensor that the host moved between devices hides that it is of inference mode.
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
    """The same memory as a tensor of today's mode: what is made in inference mode can never be saved otherwise."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _outside_inference(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(_outside_inference(part) for part in value)
    return value


@contextlib.contextmanager
def _checkpointed(network: torch.nn.Module, copied: bool = False) -> Iterator[None]:
    """Blocks keep their inputs only and compute again in the backward pass; `copied` for those that work in place."""
    blocks = _blocks(network)
    originals = []
    try:
        for block in blocks:
            originals.append((block, block.__dict__.get("forward")))
            block.forward = _recomputing(_on_a_copy(block.forward) if copied else block.forward)
        yield
    finally:
        for block, original in originals:
            del block.forward
            if original is not None:
                block.forward = original


def _on_a_copy(forward):
    return lambda x, *args, **kwargs: forward(x.clone(), *args, **kwargs)


def _recomputing(forward):
    def checkpointed(*args, **kwargs):
        # The model writes the block's place into these options as it goes: each block keeps its own.
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        kwargs = {key: dict(a) if isinstance(a, dict) else a for key, a in kwargs.items()}
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks: what lies in the network's own lists, one level down where that is a sequence."""
    blocks = []
    for child in network.children():
        members = list(child) if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential) else []
        for member in members:
            inner = list(member) if isinstance(member, torch.nn.Sequential | torch.nn.ModuleList) else [member]
            blocks.extend(module for module in inner if any(True for _ in module.parameters()))
    return blocks
