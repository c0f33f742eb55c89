"""A model of ComfyUI's, loaded and differentiable for as long as a training lasts, and then as it was before."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.lightricks.model import LTXBaseModel
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ..inputs.families import family
from ..patching import models
from ..patching.wan_blocks import OVERRIDE
from . import memory
from .config import TrainingConfig
from .differentiable import (
    checkpointed_blocks,
    copied_activations,
    copied_norm_inputs,
    frozen_parameters,
    host_in_training,
    outside_inference,
    streamed_layers,
)
from .whole_network import BYTES_PER_PARAMETER

# What a CONDITIONING may hold that only sampling applies.
_UNTRAINED = {"hooks": "hooks, such as a scheduled LoRA", "control": "a ControlNet"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# More bytes than any device has: ComfyUI then loads no weight for good.
_ALL_MEMORY = 1e20


class ModelDenoiser:
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
        """A copy of the patcher's, with an attention that has a backward pass."""
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)["transformer_options"]
        return {**options, OVERRIDE: _attention_with_gradient}

    def prepare(self, conditioning: list, latent: torch.Tensor) -> dict[str, Any]:
        """The model's conditions of one CONDITIONING for latents of this shape [1, C, ...], as ComfyUI makes them
        (pooled vectors, sizes, ...), ready for `denoise`. Raises ValueError unless it is one plain entry.
        """
        if len(conditioning) != 1:
            raise ValueError(
                f"a caption to train on has {len(conditioning)} conditioning entries: connect one plain "
                "CLIP Text Encode for each picture, without combining or areas"
            )
        for name, what in _UNTRAINED.items():
            if conditioning[0][1].get(name) is not None:
                raise ValueError(
                    f"a caption to train on holds {what}, which training would ignore: connect CLIP Text Encode "
                    "without it"
                )
        entries = comfy.sampler_helpers.convert_cond(conditioning)
        noise = torch.zeros_like(latent, device=self.device)
        # Also as the latent image: inpainting models make their mask and picture of it, here empty ones.
        processed = comfy.samplers.process_conds(
            self.model, noise, {"positive": entries}, self.device, latent_image=noise, seed=0  # of upscalers' noise
        )
        entries = processed["positive"]
        conditions = {key: copy.copy(value) for key, value in entries[0]["model_conds"].items()}
        for condition in conditions.values():
            if hasattr(condition, "cond"):  # the others hold no tensor yet
                condition.cond = outside_inference(condition.cond)
        return conditions

    def denoise(
        self, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[dict],
        extra_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The denoised estimate [B, C, ...] of B latents at sigma [B], in one forward pass, in fp32.

        `extra_options` are added to the transformer_options. Raises ValueError for texts or latents of other sizes
        than the model's.
        """
        batched = comfy.samplers.cond_cat(
            [{key: value.process_cond(batch_size=1, area=None) for key, value in c.items()} for c in conditions],
            device=self.device,
        )
        options = {
            **self.transformer_options, "cond_or_uncond": [0] * len(conditions), "sigmas": sigma,
            **(extra_options or {}),
        }
        try:
            return self.model.apply_model(noisy, sigma, transformer_options=options, **batched)
        except RuntimeError as error:
            if "shapes cannot be multiplied" not in str(error):
                raise
            raise ValueError(
                f"the texts or latents are another model's, whose sizes this model cannot read ({error}): connect "
                "the CLIP and the VAE that belong to this model"
            ) from error


def _attention_with_gradient(_users_override, *args, **kwargs):
    """PyTorch's attention: others, such as SageAttention, have no backward pass, and some do not say so."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def session(
    model: comfy.model_patcher.ModelPatcher, shape: Sequence[int], config: TrainingConfig, *, whole: bool = False,
    other_models: Sequence[comfy.model_patcher.ModelPatcher] = (), extra_parameters: int = 0,
) -> Iterator[ModelDenoiser]:
    """Load `model` for a process's share of batches of `shape` and make it differentiable; nothing stays afterwards.

    Weights are neither merged nor copied. `whole` leaves room for fp32 copies of them all, and lets the model
    compute with such copies in its own type. `other_models`, such as text encoders, are loaded and made
    differentiable with it. `extra_parameters` is how many parameters are trained besides the model's; they count
    in the memory asked for. Raises ValueError where a model cannot be trained through.
    """
    patcher = _trainable_clone(model, config.dtype, whole)
    # When a clone ends, ComfyUI goes back to its parent: one that ends with it, in an error's frames, would leave
    # ComfyUI with a model that nobody can unload.
    while patcher.parent is not None and patcher.parent.parent is not None:
        patcher.parent = patcher.parent.parent
    parameters = extra_parameters
    if whole:
        parameters += sum(weight.numel() for weight in patcher.model.diffusion_model.parameters())
        if config.offload:
            raise ValueError("offload is for weights that are not trained, and whole_unet trains all: switch one off")
    needs = memory.of_session(patcher, other_models, shape, BYTES_PER_PARAMETER * parameters, config)
    memory.tell_needs(needs, patcher, config, fp8=not whole)
    with _loaded([patcher, *other_models], needs.beside_weights, config.offload), contextlib.ExitStack() as stack:
        stack.callback(patcher.cleanup)
        patcher.pre_run()
        stack.enter_context(_differentiable([patcher, *other_models], encoders=other_models))
        if config.offload:
            for streamed in (patcher, *other_models):
                stack.enter_context(streamed_layers(streamed.model))
        network = patcher.model.diffusion_model
        if isinstance(network, LTXBaseModel):  # it adds in place to what was read, beyond norms
            if config.gradient_checkpointing or config.offload:
                raise ValueError(
                    f"gradient_checkpointing or offload is on, and {family(patcher)} gives wrong gradients where "
                    "parts of it are computed twice: switch both off"
                )
            stack.enter_context(copied_activations())
        elif not isinstance(network, UNetModel):
            # Flux and its relatives add in place to what a norm has read.
            stack.enter_context(copied_norm_inputs(network))
        if config.gradient_checkpointing:
            stack.enter_context(checkpointed_blocks(network, on_copies=not isinstance(network, UNetModel)))
        yield ModelDenoiser(patcher)


@contextlib.contextmanager
def encoder_session(
    patcher: comfy.model_patcher.ModelPatcher, activations: int, config: TrainingConfig
) -> Iterator[torch.nn.Module]:
    """Load an image encoder and make it differentiable, as `session` does with a diffusion model, to train it whole.

    `activations` is how many bytes its backward pass takes. With `offload` its layers fetch their weights in each
    call, trained ones as well.
    """
    patcher = clone_without_streaming(patcher)
    encoder, offload = patcher.model, config.offload
    copies = 0 if offload else BYTES_PER_PARAMETER * sum(weight.numel() for weight in encoder.parameters())
    needs = memory.Needs(0 if offload else patcher.model_size(), activations, copies)
    memory.tell_needs(needs, patcher, config, fp8=False)
    loaded = _loaded([patcher], needs.beside_weights, offload)
    differentiable = _differentiable([patcher], [patcher])
    with loaded, differentiable, contextlib.ExitStack() as stack:
        if offload:
            stack.enter_context(streamed_layers(encoder, trained=True))
        if config.gradient_checkpointing:
            for part in list(encoder.modules()):
                if any(isinstance(child, torch.nn.ModuleList) for child in part.children()):
                    stack.enter_context(checkpointed_blocks(part, on_copies=True))
        yield encoder


@contextlib.contextmanager
def _loaded(
    patchers: Sequence[comfy.model_patcher.ModelPatcher], required: float, offload: bool = False
) -> Iterator[None]:
    """Autograd on, and the models loaded whole, with room for `required` bytes beside them.

    With `offload` their weights stay in main memory, as in ComfyUI's own Train LoRA: for use with `streamed_layers`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Whole, since weights that stream in share buffers, which a backward pass would find overwritten.
        comfy.model_management.load_models_gpu(
            list(patchers), memory_required=_ALL_MEMORY if offload else required, force_full_load=not offload
        )
        yield


@contextlib.contextmanager
def _differentiable(
    patchers: Sequence[comfy.model_patcher.ModelPatcher], encoders: Sequence[comfy.model_patcher.ModelPatcher]
) -> Iterator[None]:
    """Gradients pass through the loaded models; `encoders` among them add in place to what a gradient needs."""
    with host_in_training(), contextlib.ExitStack() as stack:
        for patcher in patchers:
            stack.enter_context(frozen_parameters(patcher.model))
        for encoder in encoders:
            stack.enter_context(copied_norm_inputs(encoder.model))
        yield


def clone_without_streaming(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone that does not stream its weights. Raises ValueError where its loader cannot load it whole."""
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
    patcher = clone_without_streaming(model)
    model_dtype = patcher.model.get_dtype_inference()
    compute_dtype = _DTYPES.get(dtype, model_dtype)
    if dtype == "model" and model_dtype == torch.float16:
        # fp16 gradients vanish; ComfyUI computes such a model in bf16 just as well.
        bf16 = comfy.model_management.should_use_bf16(patcher.load_device)
        compute_dtype = torch.bfloat16 if bf16 else torch.float32
    if whole or compute_dtype != model_dtype:
        return models.with_compute_dtype(patcher, compute_dtype)
    return patcher
