"""The published Lightning checkpoints of both stages as a Fusion, as far as they fit, with a report.

Key names are derived from the published code's structure; no published weights were at hand. Stage 1 has
`img_encoder.` and `combiner.`; stage 2 has stage 1 under `fusion_model.`, then `sd_model.` with the appearance
projection, the pose path and a UNet in diffusers' names that carries `class_embedding.`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import method
from .method import WHOLE, Fusion, FusionError, Weights

_COMBINER = {
    "kpt_projection_layer": "pose_projection", "image_projection_layer": "source_projection",
    "combiner_layer": "mixing", "output_layer": "output", "dynamic_scalar.0": "gate_hidden",
    "dynamic_scalar.3": "gate",
}
_STAGE_1 = ("fusion_model.", "")
_APPEARANCE, _POSE, _UNET = "sd_model.srcimage_proj_model.", "sd_model.pose_t_proj.", "sd_model.unet."
_CLASS = f"{_UNET}class_embedding."
# Other models that lie in these files: loaded from their own, or a second copy.
_ELSEWHERE = {
    "vae.": "the autoencoder: load the base model's", "src_image_encoder.": "the appearance encoder: load DINOv2",
    "unet.": "a second copy of the UNet", "fusion_model.pose_encoder.": "a second copy of the image encoder",
    "pose_encoder.": "a second copy of the image encoder",
}


def is_published(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these keys are of a published checkpoint, of either stage."""
    stages = tuple(f"{stage}combiner.{layer}." for stage in _STAGE_1 for layer in _COMBINER)
    return any(key.startswith((*stages, _UNET, _APPEARANCE)) for key in tensors)


def convert(
    tensors: Mapping[str, torch.Tensor], make_encoder: Callable[[Weights], Any]
) -> tuple[Fusion, list[str]]:
    """The Fusion, and a line of report for each part: what fits, what is left, what is missing.

    make_encoder(weights under the host's names) gives a CLIP_VISION, or None where it does not know them. Raises
    FusionError where nothing fits.
    """
    left = dict(tensors)
    report: list[str] = []
    prefix = next((stage for stage in _STAGE_1 if any(k.startswith(f"{stage}combiner.") for k in left)), "")
    encoder_weights = _taken(left, f"{prefix}img_encoder.")
    combiner = _renamed(_taken(left, f"{prefix}combiner."), _COMBINER)
    combiner = _part(report, "combiner", combiner, method.combiner_width)
    encoder = None
    if encoder_weights:
        # The host reads shapes from keys that it does not look for.
        with contextlib.suppress(LookupError, RuntimeError, UnboundLocalError):
            encoder = make_encoder(dict(encoder_weights))
        known = "converted" if encoder is not None else "not known to the host: connect clip_vision instead"
        report.append(f"image encoder, {len(encoder_weights)} weights: {known}")
    generator = _projection(_taken(left, _APPEARANCE), "appearance") | {
        f"pose.{key}": weight for key, weight in _taken(left, _POSE).items()
    } | _projection(_taken(left, _CLASS), "embedding")
    generator = _part(report, "generator", generator, method.generator_sizes)
    unet = _taken(left, _UNET) or None
    if unet:
        report.append(f"whole UNet, {len(unet)} weights: checked against the model when it is applied")
    for start, words in _ELSEWHERE.items():
        others = _taken(left, start)
        if others:
            report.append(f"{len(others)} weights left out, {words}")
    if left:
        report.append(f"{len(left)} weights not understood, {sorted(left)[0]} first")
    if combiner is None and generator is None:
        raise FusionError("nothing of it fits: " + "; ".join(report))
    return Fusion(combiner, encoder, generator, unet, WHOLE if unet else ""), report


def _taken(left: dict[str, torch.Tensor], start: str) -> Weights:
    """What begins with `start`, under the rest of its name, out of `left`."""
    return {key.removeprefix(start): left.pop(key) for key in sorted(left) if key.startswith(start)}


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    found = {}
    for key, weight in weights.items():
        layer, _, leaf = key.rpartition(".")
        found[f"{names.get(layer, layer)}.{leaf}"] = weight.float()
    return found


def _projection(weights: Weights, name: str) -> Weights:
    """A sequence of linear layers, with a layer norm between them or none, by the order of its numbers."""
    layers = sorted({key.rpartition(".")[0] for key in weights})
    matrices = [layer for layer in layers if weights.get(f"{layer}.weight", torch.zeros(1)).ndim == 2]
    names = dict(zip(matrices, ("first", "second"), strict=False))
    names |= {layer: "norm" for layer in layers if layer not in names}
    return {f"{name}.{key}": weight for key, weight in _renamed(weights, names).items()}


def _part(report: list[str], name: str, weights: Weights, check: Callable[[Weights], Any]) -> Weights | None:
    """The part, or None where it is not there or not whole, with a line of report."""
    if not weights:
        return None
    weights = {key: weight.float() for key, weight in weights.items()}
    try:
        check(weights)
    except FusionError as error:
        report.append(f"{name}, {len(weights)} weights: left out, since {error}")
        return None
    report.append(f"{name}, {len(weights)} weights: converted")
    return weights
