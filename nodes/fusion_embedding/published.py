"""Published Lightning checkpoints of both stages as a Fusion: apart from files.py, since it renames other layouts.

Key names are derived from the published code; no published weights were available. Stage 1 has `img_encoder.` and
`combiner.`; stage 2 has stage 1 under `fusion_model.`, and `sd_model.` with the appearance projection, the pose path
and a UNet in diffusers' names that includes `class_embedding.`.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .layout import FusionError, Weights, combiner_width, generator_sizes
from .method import WHOLE, Fusion

_COMBINER = {
    "kpt_projection_layer": "pose_projection", "image_projection_layer": "source_projection",
    "combiner_layer": "mixing", "output_layer": "output", "dynamic_scalar.0": "gate_hidden",
    "dynamic_scalar.3": "gate",
}
_STAGE_1 = ("fusion_model.", "")
_APPEARANCE, _POSE, _UNET = "sd_model.srcimage_proj_model.", "sd_model.pose_t_proj.", "sd_model.unet."
_CLASS = f"{_UNET}class_embedding."
# Other models in these files: separate downloads, or second copies.
_LEFT_OUT = {
    "vae.": "the autoencoder: load the base model's", "src_image_encoder.": "the appearance encoder: load DINOv2",
    "unet.": "a second copy of the UNet", "fusion_model.pose_encoder.": "a second copy of the image encoder",
    "pose_encoder.": "a second copy of the image encoder",
}


def is_published(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the keys of a published checkpoint, of either stage."""
    stages = tuple(f"{stage}combiner.{layer}." for stage in _STAGE_1 for layer in _COMBINER)
    return any(key.startswith((*stages, _UNET, _APPEARANCE)) for key in tensors)


def convert(tensors: Mapping[str, torch.Tensor], make_encoder: Callable[[Weights], Any]) -> tuple[Fusion, list[str]]:
    """The Fusion, and a line of report per part: what fits, and what is left out.

    make_encoder(weights under ComfyUI's names) returns a CLIP_VISION, or None if it does not know them. Raises
    FusionError if nothing fits.
    """
    rest = dict(tensors)
    report: list[str] = []
    prefix = next((stage for stage in _STAGE_1 if any(k.startswith(f"{stage}combiner.") for k in rest)), "")
    encoder_weights = _take(rest, f"{prefix}img_encoder.")
    combiner = _renamed(_take(rest, f"{prefix}combiner."), _COMBINER)
    combiner = _part(report, "combiner", combiner, combiner_width)
    encoder = None
    if encoder_weights:
        # ComfyUI reads shapes of keys without checking that they exist.
        with contextlib.suppress(LookupError, RuntimeError, UnboundLocalError):
            encoder = make_encoder(dict(encoder_weights))
        known = "converted" if encoder is not None else "unknown to ComfyUI: connect clip_vision instead"
        report.append(f"image encoder, {len(encoder_weights)} weights: {known}")
    generator = _projection(_take(rest, _APPEARANCE), "appearance") | {
        f"pose.{key}": weight for key, weight in _take(rest, _POSE).items()
    } | _projection(_take(rest, _CLASS), "embedding")
    generator = _part(report, "generator", generator, generator_sizes)
    unet = _take(rest, _UNET) or None
    if unet:
        report.append(f"whole UNet, {len(unet)} weights: checked against the model when it is applied")
    for start, words in _LEFT_OUT.items():
        others = _take(rest, start)
        if others:
            report.append(f"{len(others)} weights left out, {words}")
    if rest:
        report.append(f"{len(rest)} unknown weights, {sorted(rest)[0]} first")
    if combiner is None and generator is None:
        raise FusionError("no part of it fits: " + "; ".join(report))
    return Fusion(combiner, encoder, generator, unet, WHOLE if unet else ""), report


def _take(rest: dict[str, torch.Tensor], start: str) -> Weights:
    """The weights that begin with `start`, under the rest of their names, removed from `rest`."""
    return {key.removeprefix(start): rest.pop(key) for key in sorted(rest) if key.startswith(start)}


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    renamed = {}
    for key, weight in weights.items():
        layer, _, leaf = key.rpartition(".")
        renamed[f"{names.get(layer, layer)}.{leaf}"] = weight.float()
    return renamed


def _projection(weights: Weights, name: str) -> Weights:
    """Two linear layers with or without a layer norm between them, named by the order of their numbers."""
    layers = sorted({key.rpartition(".")[0] for key in weights})
    matrices = [layer for layer in layers if weights.get(f"{layer}.weight", torch.zeros(1)).ndim == 2]
    names = dict(zip(matrices, ("first", "second"), strict=False))
    names |= {layer: "norm" for layer in layers if layer not in names}
    return {f"{name}.{key}": weight for key, weight in _renamed(weights, names).items()}


def _part(report: list[str], name: str, weights: Weights, check: Callable[[Weights], Any]) -> Weights | None:
    """The part, or None if it is absent or incomplete, and its line of the report."""
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
