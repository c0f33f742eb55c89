"""A fusion in a sampling run: its conditionings, and the two patches of a UNet that read them.

Everything about one picture travels in its CONDITIONING: tokens instead of the text's, and under `model_conds` the
class embedding and the pose's residual, which ComfyUI batches, crops and splits with it. Before each call of the
model they are handed to two patches, one after the time's embedding and one after the first convolution. No patch
holds a tensor.
"""

import logging
from collections.abc import Mapping
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP

from ..files import fitting
from ..inputs.families import family, identity_instead
from ..messages import tell
from ..patching import models
from . import layout, method
from .config import ApplyConfig
from .layout import FusionError, Sizes, Weights
from .method import LORA, Fusion, UNetInputs

KEY = "understudy_fusion"
EMBEDDING, POSE = f"{KEY}_embedding", f"{KEY}_pose"
_FIRST_BLOCK = ("input", 0)
_PREDICTIONS = {"EPS": "noise", "V_PREDICTION": "v", "EDM": "", "X0": "", "LCM": ""}  # of ComfyUI's classes
_NOISY, _ALONG = 5.0, 0.7  # ours: a sigma at which both differ most, and a cosine between theirs of 0.98 and 0.2
# ComfyUI's SDXL classes append the sizes of a picture, so many numbers of 256 parts, to the pooled text.
_SIZE_PARTS = 256
_SDXL_SIZES = {"SDXL": 6, "SDXLRefiner": 5}


class _PerPicture:
    """A condition with one row per picture, or one for all."""

    def process_cond(self, batch_size, **kwargs):
        if self.cond.shape[0] not in (1, batch_size):
            raise FusionError(
                f"this conditioning is for {self.cond.shape[0]} pictures and the latent has {batch_size}: set the "
                f"latent's batch_size to {self.cond.shape[0]}, or apply one pose at a time, as a list"
            )
        return super().process_cond(batch_size, **kwargs)


class _Embedding(_PerPicture, comfy.conds.CONDRegular):
    """[B, time]"""


class _Residual(_PerPicture, comfy.conds.CONDNoiseShape):
    """[B, channels, h, w] at the latent's size, and cropped with it."""


class _EmbeddingPatch:
    """ComfyUI's emb_patch."""

    key = KEY

    def __call__(self, emb: torch.Tensor, _channels: int, options: Mapping[str, Any]) -> torch.Tensor:
        added = options.get(KEY)
        return emb if added is None else emb + added[EMBEDDING].to(emb)


class _PosePatch:
    """ComfyUI's input_block_patch."""

    key = KEY

    def __call__(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        added = options.get(KEY)
        return h if added is None or options["block"] != _FIRST_BLOCK else h + added[POSE].to(h)


def _check_size(residual: torch.Tensor, x: torch.Tensor, model: Any) -> None:
    if residual.shape[-2:] != x.shape[-2:]:
        height, width = (n * model.latent_format.spacial_downscale_ratio for n in x.shape[-2:])
        raise FusionError(
            f"the pose fits a latent of {residual.shape[-1]} x {residual.shape[-2]} (width x height) and this one is "
            f"{x.shape[-1]} x {x.shape[-2]}: scale the pose to {width} x {height} pixels"
        )


def _calc_cond_batch(executor, model, conds, x_in, *args):
    """ComfyUI's CALC_COND_BATCH: checks poses before areas crop them, which would hide that they do not fit."""
    for cond in (cond for entries in conds for cond in entries or ()):
        if POSE in cond["model_conds"]:
            _check_size(cond["model_conds"][POSE].cond, x_in, model)
    return executor(model, conds, x_in, *args)


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """ComfyUI's APPLY_MODEL: hands the patches what the conditionings of this call hold for them."""
    added = {name: kwargs.pop(name) for name in (EMBEDDING, POSE) if name in kwargs}
    if added:
        _check_size(added[POSE], x, executor.class_obj)
        transformer_options = {**transformer_options, KEY: added}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def _notice_prediction(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
):
    """ComfyUI's APPLY_MODEL around a whole UNet: warns at the first step if it predicts something other than the
    model is sampled as. An estimate of the noise points along a noisy x; one of v is nearly at right angles to it.
    """
    denoised = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    sampled_as, sigmas = prediction(executor.class_obj.model_sampling), transformer_options.get("sample_sigmas")
    if sigmas is None or not sampled_as:  # in training, which need not wait for a GPU here
        return denoised
    sigma = float(t.max())
    if sigma >= max(_NOISY, float(sigmas[0]) * (1 - 1e-4)):
        clean = x.float() / (sigma**2 + 1) if sampled_as == "v" else x.float()
        along = torch.cosine_similarity((clean - denoised.float()).flatten(), x.float().flatten(), dim=0)
        predicted = "noise" if along > _ALONG else "v"
        if predicted != sampled_as:
            tell("Apply Fusion", [_misfit(predicted, sampled_as)], logging.WARNING)
    return denoised


def _misfit(predicted: str, sampled_as: str) -> str:
    return (
        f"this fusion's UNet predicts {predicted} and the model is sampled as one that predicts {sampled_as}, which "
        "gives no picture: load the model that it was trained on, which for the published one is the v-prediction "
        "SD 2.1 (v2-1_768-ema-pruned)"
    )


def prediction(model_sampling: Any) -> str:
    """"noise" or "v", what a model is sampled as predicting; "" for what was not published with either."""
    kinds = [base.__name__ for base in type(model_sampling).__mro__]
    return next((_PREDICTIONS[kind] for kind in kinds if kind in _PREDICTIONS), "")


def check_prediction(model: Any, fusion: Fusion) -> None:
    """Raises FusionError where the model is sampled as predicting something other than the fusion's."""
    sampled_as = prediction(model.get_model_object("model_sampling"))
    if fusion.prediction and sampled_as and fusion.prediction != sampled_as:
        raise FusionError(_misfit(fusion.prediction, sampled_as))


def with_fusion_patches(model: Any) -> Any:
    """A clone of `model` whose UNet adds what the transformer_options of a call hold under KEY, if they hold it.

    Raises FusionError if it is not a UNet of the SD and SDXL kind.
    """
    unet(model)
    wrappers = {WrappersMP.CALC_COND_BATCH: _calc_cond_batch, WrappersMP.APPLY_MODEL: _apply_model}
    patched = models.with_wrappers(model, key=KEY, wrappers=wrappers)
    return models.with_unet_patches(
        patched, patches={"emb_patch": _EmbeddingPatch(), "input_block_patch": _PosePatch()}
    )


def unet(model: Any) -> UNetModel:
    """The UNet of a MODEL. Raises FusionError if it is another network, or needs what no fusion provides."""
    network = model.get_model_object("diffusion_model")
    if type(network) is not UNetModel:
        raise FusionError(
            f"model is {family(model)}, a {type(network).__name__}, and a fusion needs a UNet: load SD 1.5, SD 2.1 "
            f"or SDXL, or {identity_instead(model)}"
        )
    if network.num_classes is not None and type(model.model).__name__ not in _SDXL_SIZES:
        raise FusionError(f"model is {family(model)}, whose class labels are unknown: load SD 1.5, 2.1 or SDXL")
    return network


def model_sizes(model: Any, encoder: int, embedding: int | None, embedding_tokens: int = 0) -> Sizes:
    """The sizes of a generator for this MODEL, with hidden states and e_f of these widths, and tokens of e_f."""
    network = unet(model)
    return Sizes(
        encoder, model.model.model_config.unet_config["context_dim"], embedding,
        network.time_embed[2].out_features if embedding is not None else 0,
        network.input_blocks[0][0].out_channels, 0 if embedding is None else embedding_tokens,
    )


def check_model(model: Any, generator: Weights) -> Sizes:
    """The generator's sizes. Raises FusionError, naming the key, if they are another model's."""
    sizes = layout.generator_sizes(generator)
    required = model_sizes(model, sizes.encoder, sizes.embedding)
    for name, key in (("context", "appearance.second.weight"), ("time", "embedding.second.weight"),
                      ("channels", "pose.conv_out.weight")):
        if getattr(sizes, name) != getattr(required, name):
            raise FusionError(
                f"this fusion's {key} gives {getattr(sizes, name)} channels and the model takes "
                f"{getattr(required, name)}: load the model that it was trained for"
            )
    ratio, reduction = model.model.latent_format.spacial_downscale_ratio, layout.pose_reduction(generator)
    if reduction != ratio:
        raise FusionError(
            f"this fusion's pose path makes one cell of {reduction} pixels and the model's latents one of {ratio}: "
            "load the model that it was trained for"
        )
    return sizes


def with_unet(model: Any, fusion: Fusion, strength: float, node: str = "Apply Fusion") -> Any:
    """A clone of `model` with the fusion's LoRA or whole UNet; `node` is who says what it lacks. Raises FusionError,
    naming the first key that belongs to another model, before anything is patched.
    """
    if not fusion.unet:
        return model
    try:
        if fusion.unet_kind == LORA:
            fitting.check_lora(model, fusion.unet)
            return models.with_lora(model, weights=fusion.unet, strength=strength)
        weights, missing = fitting.whole_network(model, fusion.unet)
    except fitting.MisfitError as error:
        raise FusionError(f"this fusion's {error}: load the model that it was trained for") from error
    if missing:
        warning = f"the fusion's UNet lacks {len(missing)} weights, {missing[0]} first: there the model keeps its own"
        tell(node, [warning], logging.WARNING)
    model = models.with_weights(model, weights=weights, strength=strength)
    return models.with_wrappers(
        model, key=f"{KEY}_prediction", wrappers={WrappersMP.APPLY_MODEL: _notice_prediction}
    )


def conditionings(
    model: Any, generator: Weights, states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor,
    strength: float = 1.0,
) -> tuple[list, list]:
    """Positive and negative CONDITIONING for hidden states [B, T, W], e_f [B, D] and drawings [B, H, W, 3].

    In the negative, source, fusion and pose are left out, as published. With it, ComfyUI's CFG is the published
    guidance: its three branches u + w (s - u) + w (g - s) are u + w (g - u). Raises FusionError if sizes do not fit.
    """
    count = _check_inputs(check_model(model, generator), states, fused, pose)
    weights = {key: value.to(model.load_device, torch.float32) for key, value in generator.items()}
    inputs = method.unet_inputs(weights, states, fused, pose[..., :3].movedim(-1, 1).float())
    return tuple(
        _conditioning(part, count, strength, _pooled(model)) for part in (inputs, method.left_out(weights, inputs))
    )


def _check_inputs(sizes: Sizes, states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor) -> int:
    """The batch size. Raises FusionError, naming the input."""
    if states.shape[-1] != sizes.encoder:
        raise FusionError(
            f"appearance has tokens of {states.shape[-1]} numbers and this fusion takes {sizes.encoder}: encode the "
            "source with the CLIP vision model that it was trained with"
        )
    if sizes.embedding is not None and fused is None:
        raise FusionError("this fusion was trained with a fusion embedding: connect Combine Fusion to fusion_embed")
    if fused is not None and fused.shape[-1] != sizes.embedding:
        raise FusionError(
            f"fusion_embed has {fused.shape[-1]} numbers and this fusion takes {sizes.embedding}: combine it with "
            "the same fusion"
        )
    method.check_poses(pose)
    counts = {"appearance": len(states), "pose": len(pose)}
    return method.common_batch_size(counts if fused is None else counts | {"fusion_embed": len(fused)})


def _conditioning(inputs: UNetInputs, count: int, strength: float, pooled: Mapping[str, torch.Tensor]) -> list:
    """One row for all takes the memory of one: a long sequence has many that are left out."""
    tokens, embedding, residual = (part.cpu() for part in inputs)
    tokens, embedding, residual = (
        method.to_batch(part, count) for part in (tokens, embedding * strength, residual * strength)
    )
    return [[tokens, {**pooled, "model_conds": {EMBEDDING: _Embedding(embedding), POSE: _Residual(residual)}}]]


def _pooled(model: Any) -> dict[str, torch.Tensor]:
    """What SDXL appends its sizes to: no text."""
    parts = _SDXL_SIZES.get(type(model.model).__name__)
    return {} if parts is None else {"pooled_output": torch.zeros(1, model.model.adm_channels - parts * _SIZE_PARTS)}


def empty_conditioning(model: Any) -> list:
    """A CONDITIONING without tokens, for what else a MODEL needs of one."""
    return [[torch.zeros(1, 1, model.model.model_config.unet_config["context_dim"]), _pooled(model)]]


def apply(
    model: Any, fusion: Fusion, states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor,
    config: ApplyConfig,
) -> tuple[Any, list, list]:
    """`model` with a fusion, and the positive and negative CONDITIONING of B pictures; `model` itself at strength 0.

    states: hidden states [B, T, W]. fused: e_f [B, D] or None. pose: drawings [B, H, W, 3]. `strength` scales the
    trained UNet, the class embedding and the pose alike, not the tokens. Raises FusionError, naming the input and the
    fix, if things do not fit together.
    """
    if fusion.generator is None:
        raise FusionError("this fusion has no generator: train one with Train Fusion Generator")
    check_prediction(model, fusion)
    positive, negative = conditionings(model, fusion.generator, states, fused, pose, config.strength)
    if config.strength == 0:
        return model, positive, negative
    return with_fusion_patches(with_unet(model, fusion, config.strength)), positive, negative
