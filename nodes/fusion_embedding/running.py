"""A fusion inside a sampling run: its conditionings, and the two places of a UNet that they reach.

Everything of one picture travels in its CONDITIONING: tokens in place of the text's, and under `model_conds` the
class embedding and the pose's residual, which the host batches, crops and splits with it. Before each call of the
model they are handed to two patches, one after the time's embedding and one after the first convolution. No patch
holds a tensor.
"""

from __future__ import annotations

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
from ..patching import models
from . import method
from .config import ApplyConfig
from .method import LORA, Fusion, FusionError, Sizes, Weights

KEY = "understudy_fusion"
EMBEDDING, POSE = f"{KEY}_embedding", f"{KEY}_pose"
_FIRST = ("input", 0)
# The host's SDXL classes add the sizes of a picture, so many numbers of 256 parts, to the pooled text.
_SIZE_PARTS = 256
_SDXL_SIZES = {"SDXL": 6, "SDXLRefiner": 5}


class _EachPicture:
    """A condition whose rows belong to pictures: as many as these, or one for all."""

    def process_cond(self, batch_size, **kwargs):
        if self.cond.shape[0] not in (1, batch_size):
            raise FusionError(
                f"this conditioning is for {self.cond.shape[0]} pictures and the latent has {batch_size}: set the "
                f"latent's batch_size to {self.cond.shape[0]}, or apply one pose at a time, as a list"
            )
        return super().process_cond(batch_size, **kwargs)


class _Embedding(_EachPicture, comfy.conds.CONDRegular):
    """[B, time]"""


class _Residual(_EachPicture, comfy.conds.CONDNoiseShape):
    """[B, channels, h, w] at the latent's size, cut as the latent is."""


class _EmbeddingPatch:
    """The host's emb_patch."""

    key = KEY

    def __call__(self, emb: torch.Tensor, _channels: int, options: Mapping[str, Any]) -> torch.Tensor:
        added = options.get(KEY)
        return emb if added is None else emb + added[EMBEDDING].to(emb)


class _PosePatch:
    """The host's input_block_patch."""

    key = KEY

    def __call__(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        added = options.get(KEY)
        return h if added is None or options["block"] != _FIRST else h + added[POSE].to(h)


def _check_size(residual: torch.Tensor, x: torch.Tensor, model: Any) -> None:
    if residual.shape[-2:] != x.shape[-2:]:
        height, width = (n * model.latent_format.spacial_downscale_ratio for n in x.shape[-2:])
        raise FusionError(
            f"the pose fits a latent of {residual.shape[-1]} x {residual.shape[-2]} (width x height) and this one is "
            f"{x.shape[-1]} x {x.shape[-2]}: scale the pose to {width} x {height} pixels"
        )


def _calc_cond_batch(executor, model, conds, x_in, *args):
    """The host's CALC_COND_BATCH: look at poses before areas cut them, which would hide that they do not fit."""
    for cond in (cond for entries in conds for cond in entries or ()):
        if POSE in cond["model_conds"]:
            _check_size(cond["model_conds"][POSE].cond, x_in, model)
    return executor(model, conds, x_in, *args)


def _apply_model(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
):
    """The host's APPLY_MODEL: hand the patches what this call's conditionings brought, if they brought anything."""
    added = {name: kwargs.pop(name) for name in (EMBEDDING, POSE) if name in kwargs}
    if added:
        _check_size(added[POSE], x, executor.class_obj)
        transformer_options = {**transformer_options, KEY: added}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def extended(model: Any) -> Any:
    """A clone of `model` whose UNet sees what a call brings under KEY; nothing is brought by itself.

    Raises FusionError where it is no UNet of the SD and SDXL kind.
    """
    unet(model)
    wrappers = {WrappersMP.CALC_COND_BATCH: _calc_cond_batch, WrappersMP.APPLY_MODEL: _apply_model}
    patched = models.with_wrappers(model, key=KEY, wrappers=wrappers)
    return models.with_unet_patches(
        patched, patches={"emb_patch": _EmbeddingPatch(), "input_block_patch": _PosePatch()}
    )


def unet(model: Any) -> UNetModel:
    """The UNet of a MODEL. Raises FusionError where it is another network, or needs what no fusion gives."""
    network = model.get_model_object("diffusion_model")
    if type(network) is not UNetModel:
        raise FusionError(
            f"model is a {type(network).__name__}, and a fusion needs a UNet: load SD 1.5, SD 2.1 or SDXL"
        )
    if network.num_classes is not None and type(model.model).__name__ not in _SDXL_SIZES:
        raise FusionError(f"a {type(model.model).__name__} with class labels is not known: load SD 1.5, 2.1 or SDXL")
    return network


def model_sizes(model: Any, encoder: int, embedding: int | None) -> Sizes:
    """The widths that a generator for this MODEL has, with tokens and e_f of the given widths."""
    network = unet(model)
    return Sizes(
        encoder, model.model.model_config.unet_config["context_dim"], embedding,
        network.time_embed[2].out_features if embedding is not None else 0,
        network.input_blocks[0][0].out_channels,
    )


def check_model(model: Any, generator: Weights) -> Sizes:
    """The generator's sizes. Raises FusionError, naming the key, where they are another model's."""
    sizes = method.generator_sizes(generator)
    own = model_sizes(model, sizes.encoder, sizes.embedding)
    for name, key in (("context", "appearance.second.weight"), ("time", "embedding.second.weight"),
                      ("channels", "pose.conv_out.weight")):
        found, expected = getattr(sizes, name), getattr(own, name)
        if found != expected:
            raise FusionError(
                f"this fusion's {key} gives {found} channels and the model takes {expected}: load the model that it "
                "was trained for"
            )
    ratio = model.model.latent_format.spacial_downscale_ratio
    if method.pose_reduction(generator) != ratio:
        raise FusionError(
            f"this fusion's pose path makes one place of {method.pose_reduction(generator)} pixels and the model's "
            f"latents of {ratio}: load the model that it was trained for"
        )
    return sizes


def with_unet(model: Any, fusion: Fusion, strength: float) -> Any:
    """A clone of `model` with the fusion's LoRA or whole UNet. Raises FusionError, naming the first key that is of
    another model; the model is not touched before.
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
        logging.warning("[Understudy] the fusion's UNet lacks %d weights, %s first", len(missing), missing[0])
    return models.with_weights(model, weights=weights, strength=strength)


def conditionings(
    model: Any, generator: Weights, states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor,
    strength: float = 1.0,
) -> tuple[list, list]:
    """Positive and negative CONDITIONING of hidden states [B, T, W], e_f [B, D] and drawings [B, H, W, 3].

    The negative has no tokens, no fusion embedding and no pose: tokens and residual are 0, and the embedding is that
    of an e_f of zeros, all as published. With it, the host's CFG is the published guidance: its three branches
    u + w (s - u) + w (g - s) are u + w (g - u). One row serves all. Raises FusionError for other counts.
    """
    sizes = check_model(model, generator)
    if states.shape[-1] != sizes.encoder:
        raise FusionError(
            f"appearance has tokens of {states.shape[-1]} numbers and this fusion takes {sizes.encoder}: encode the "
            "source with the CLIP vision model that it was trained with"
        )
    if sizes.embedding is not None and fused is None:
        raise FusionError("this fusion was trained with a fusion embedding: connect Combine Fusion to fusion_embed")
    if sizes.embedding is not None and fused.shape[-1] != sizes.embedding:
        raise FusionError(
            f"fusion_embed has {fused.shape[-1]} numbers and this fusion takes {sizes.embedding}: combine it with "
            "the same fusion"
        )
    method.check_poses(pose)
    counts = {"appearance": len(states), "pose": len(pose)}
    count = method.rows(counts if fused is None else counts | {"fusion_embed": len(fused)})
    device = model.load_device
    weights = {key: value.to(device, torch.float32) for key, value in generator.items()}
    drawings = pose[..., :3].movedim(-1, 1).float()
    # One at a time, since a pose at full size is far larger than what becomes of it.
    residual = torch.cat([method.pose_residual(weights, part.to(device)).cpu() for part in drawings.split(1)])
    tokens = method.appearance_tokens(weights, states.to(device)).cpu()
    embedding = none = torch.zeros(1, 1)
    if sizes.embedding is not None:
        embedding = method.class_embedding(weights, fused.to(device)).cpu()
        none = method.class_embedding(weights, torch.zeros(1, sizes.embedding, device=device)).cpu()
    residual, tokens, embedding, none = (
        method.expanded(part, count) for part in (residual * strength, tokens, embedding * strength, none * strength)
    )
    pooled = _pooled(model)
    # One row of zeros, seen B times: a long sequence's residuals take as much memory as they are.
    no_tokens, no_residual = (method.expanded(torch.zeros_like(part[:1]), count) for part in (tokens, residual))
    return (
        _conditioning(tokens, embedding, residual, pooled), _conditioning(no_tokens, none, no_residual, pooled)
    )


def _conditioning(tokens, embedding, residual, pooled: Mapping[str, torch.Tensor]) -> list:
    return [[tokens, {**pooled, "model_conds": {EMBEDDING: _Embedding(embedding), POSE: _Residual(residual)}}]]


def _pooled(model: Any) -> dict[str, torch.Tensor]:
    """What SDXL adds its sizes to: no text."""
    parts = _SDXL_SIZES.get(type(model.model).__name__)
    return {} if parts is None else {"pooled_output": torch.zeros(1, model.model.adm_channels - parts * _SIZE_PARTS)}


def template(model: Any) -> list:
    """A CONDITIONING without tokens, for what else a MODEL asks of one."""
    return [[torch.zeros(1, 1, model.model.model_config.unet_config["context_dim"]), _pooled(model)]]


def apply(
    model: Any, fusion: Fusion, states: torch.Tensor, fused: torch.Tensor | None, pose: torch.Tensor,
    config: ApplyConfig,
) -> tuple[Any, list, list]:
    """`model` with a fusion, and the positive and negative CONDITIONING of B pictures; `model` itself at strength 0.

    `strength` weakens what was learnt of the UNet, the class embedding and the pose alike; the tokens stay.
    Raises FusionError, naming the input and the fix, where things do not fit together.
    """
    if fusion.generator is None:
        raise FusionError("this fusion holds no generator: train one with Train Fusion Generator")
    positive, negative = conditionings(model, fusion.generator, states, fused, pose, config.strength)
    if config.strength == 0:
        return model, positive, negative
    return extended(with_unet(model, fusion, config.strength)), positive, negative
