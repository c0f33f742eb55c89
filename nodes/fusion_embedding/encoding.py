"""Image encoders of the host as the fusion embedding uses them: whole pictures, embeddings and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import torch

from . import method
from .method import FusionError

_AT_ONCE = 16  # pictures in one pass outside training
# Encoders that take one square of fixed size.
TRAINABLE = ("clip_vision_model", "dinov2")
_SAME = 0.99  # ours: least cosine of two probes of one encoder, which may compute in another precision
_LARGEST = 1 << 16  # for any number in a file's description of an encoder
_MOST_WEIGHTS = 1 << 31  # in one kind of its layers
_MOST_LAYERS = 256  # each takes time to build, however narrow it is


def embeddings(clip_vision: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The encoder's embedding of each picture [B, H, W, 3], [B, D], unnormalised, fp32 on the CPU.

    Pictures are squeezed to the encoder's square, as in the published data: a crop would cut heads and feet off.
    """
    parts = [clip_vision.encode_image(part, crop=False).image_embeds for part in pictures.split(_AT_ONCE)]
    found = torch.cat(parts).float().cpu()
    if found.ndim != 2:
        raise FusionError(f"this image encoder gives {tuple(found.shape)}, no embedding: use CLIP or DINOv2")
    return _finite(found)


def states(clip_vision: Any, picture: torch.Tensor) -> torch.Tensor:
    """The last hidden states of pictures [B, H, W, 3], [B, T, W], fp32 on the CPU; squeezed, too."""
    return hidden(clip_vision.encode_image(picture, crop=False))


def hidden(output: Any) -> torch.Tensor:
    """The last hidden states of a CLIP_VISION_OUTPUT. Raises FusionError where it has none."""
    found = output.last_hidden_state
    if found is None or found.ndim != 3:
        raise FusionError("appearance has no hidden states: connect CLIP Vision Encode with a CLIP or DINOv2 model")
    return _finite(found.float().cpu())


def _finite(found: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(found).all():
        raise FusionError(
            "the image encoder gives NaN or infinite values: load or render its pictures again, or start ComfyUI "
            "with --fp32-text-enc, which image encoders follow, too"
        )
    return found


def fused(
    combiner: Mapping[str, torch.Tensor], clip_vision: Any, source: torch.Tensor, pose: torch.Tensor
) -> torch.Tensor:
    """e_f [B, D] of pictures [B, H, W, 3], without dropout. Raises FusionError for an encoder of another width."""
    by_source, by_pose = embeddings(clip_vision, source), embeddings(clip_vision, pose)
    check_width(combiner, by_source.shape[-1])
    return method.kernel.combine(by_source, by_pose, combiner)


def check_width(combiner: Mapping[str, torch.Tensor], found: int) -> None:
    """Raises FusionError where an encoder's embeddings are not the ones that the combiner was trained with."""
    expected = method.combiner_width(combiner)
    if found != expected:
        raise FusionError(
            f"this image encoder gives embeddings of {found} numbers and the combiner takes {expected}: load the "
            "encoder that it was trained with in Load CLIP Vision"
        )


def probe(clip_vision: Any) -> torch.Tensor:
    """An encoder's embedding of one fixed picture, [D]: by it the same encoder is known again in any precision."""
    places = torch.linspace(0, 1, 64)
    down, across = torch.meshgrid(places, places, indexing="ij")
    checks = ((8 * down).floor() + (8 * across).floor()) % 2
    return embeddings(clip_vision, torch.stack([down, across, checks], dim=-1)[None])[0]


def chosen(fusion: method.Fusion, clip_vision: Any) -> Any:
    """The encoder of a fusion, or the connected one where it has none.

    Raises FusionError where neither is, and where the connected one is not the one that its combiner knows.
    """
    found = fusion.encoder if fusion.encoder is not None else clip_vision
    if fusion.encoder is None and found is not None and fusion.probe is not None:
        seen = probe(found)
        if seen.shape == fusion.probe.shape and torch.cosine_similarity(seen, fusion.probe, dim=0) < _SAME:
            raise FusionError(
                "clip_vision is another encoder than the one that the combiner was trained beside, though of its "
                "width: load that one in Load CLIP Vision"
            )
    if found is None:
        raise FusionError(
            "this fusion holds no image encoder, since it was trained beside a frozen one: connect that one to "
            "clip_vision"
        )
    return found


def differentiable(clip_vision: Any, module: torch.nn.Module) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """encode(B pictures [1, H, W, 3] of any sizes) -> embeddings [B, D] with a graph, equal to `embeddings`.

    `module` is the encoder's own, loaded. Raises FusionError for an encoder that takes pictures in another way.
    """
    if clip_vision.model_type not in TRAINABLE:
        raise FusionError(
            f"an encoder of type {clip_vision.model_type} cannot be trained here: switch train_encoder off, or use a "
            "CLIP or DINOv2 model"
        )

    def prepared(picture: torch.Tensor) -> torch.Tensor:
        return comfy.clip_model.clip_preprocess(
            picture.to(clip_vision.load_device), size=clip_vision.image_size, mean=clip_vision.image_mean,
            std=clip_vision.image_std, crop=False,
        )

    def encode(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        return module(pixel_values=torch.cat([prepared(picture) for picture in pictures]).float())[2].float()

    return encode


def rebuilt(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """The host's CLIP_VISION of a description and its weights, in the precision that the host gives its encoders.

    Raises FusionError, naming the key, where they do not belong together.
    """
    _check_description(config)
    try:
        made = comfy.clip_vision.ClipVisionModel(dict(config))
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise FusionError(f"its image encoder is described by what the host cannot build ({error!r})") from error
    own = made.get_sd()
    for key in sorted(own.keys() | weights.keys()):
        expected, found = (tuple(part[key].shape) if key in part else None for part in (own, weights))
        if expected != found:
            raise FusionError(f"its image encoder's {key!r} has shape {found}, where {expected} is expected")
    # Where the host streams weights it takes these tensors themselves, whatever their precision.
    made.load_sd({key: weight.to(own[key].dtype) for key, weight in weights.items()})
    return made


def _check_description(config: Mapping[str, Any]) -> None:
    if config.get("model_type") not in TRAINABLE:
        raise FusionError(f"its image encoder is of type {str(config.get('model_type'))[:40]!r}")
    for key, value in config.items():
        # Numbers decide how much memory is asked for.
        if isinstance(value, int | float) and not 0 <= value <= _LARGEST:
            raise FusionError(f"its image encoder has {key!r} {value}")
    needed = ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_attention_heads")
    layers, width, image, patch, heads = numbers = [config.get(key) for key in needed]
    if not all(isinstance(number, int) and number > 0 for number in numbers) or width % heads:
        raise FusionError(f"its image encoder's description lacks a sound {', '.join(needed)}")
    for key in ("image_mean", "image_std"):
        colours = config.get(key, [0.5] * 3)
        sound = isinstance(colours, list) and len(colours) == 3
        if not sound or not all(isinstance(number, int | float) for number in colours):
            raise FusionError(f"its image encoder has {key!r} {str(colours)[:40]}, where three numbers are expected")
    inner = config.get("intermediate_size", 4 * width)
    if not isinstance(inner, int):
        raise FusionError(f"its image encoder has 'intermediate_size' {str(inner)[:40]}, where a number is expected")
    weights = max(layers * width * max(inner, width), (image // patch) ** 2 * width)
    if layers > _MOST_LAYERS or weights > _MOST_WEIGHTS:
        raise FusionError(f"its image encoder has {layers} layers of width {width}, more than any that is known")
