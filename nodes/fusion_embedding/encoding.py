"""ComfyUI's image encoders as a fusion uses them: a separate file, since nodes, files and training all call it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import torch

from ...kernels.fusion_embedding import combine
from .layout import FusionError, combiner_width
from .method import Fusion

_BATCH_SIZE = 16  # pictures in one pass outside training
_DINO_SIDE = 512  # published, in pixels, where DINOv2's own is 518
_DINO_TOKENS = 1370  # of 518 pixels
# Encoders that take one square of fixed size.
TRAINABLE = ("clip_vision_model", "dinov2")
_SAME_ENCODER = 0.99  # ours: least cosine of two probes of one encoder, which may compute in another precision
_LARGEST_NUMBER = 1 << 16  # in a file's description of an encoder
_MOST_WEIGHTS = 1 << 31  # in one kind of its layers
_MOST_LAYERS = 256  # each takes time to build, however narrow it is


def embeddings(clip_vision: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The encoder's embedding of each picture [B, H, W, 3], [B, D], unnormalised, fp32 on the CPU.

    Pictures are squeezed to the encoder's square, as published in stage 2 and in use: a crop would cut off heads and
    feet. Published stage 1 squeezes the pose only, and cuts the middle square out of source and target.
    Raises FusionError for an encoder without embeddings, and for values that are not finite.
    """
    parts = [clip_vision.encode_image(part, crop=False).image_embeds for part in pictures.split(_BATCH_SIZE)]
    embedded = torch.cat(parts).float().cpu()
    if embedded.ndim != 2:
        raise FusionError(f"this image encoder gives {tuple(embedded.shape)}, not an embedding: use CLIP or DINOv2")
    return _finite(embedded)


def states(clip_vision: Any, picture: torch.Tensor) -> torch.Tensor:
    """The last hidden states of pictures [B, H, W, 3], [B, T, W], fp32 on the CPU, of `appearance`."""
    return hidden_states(appearance(clip_vision, picture))


def appearance(clip_vision: Any, pictures: torch.Tensor) -> Any:
    """CLIP_VISION_OUTPUT of whole pictures [B, H, W, 3], squeezed to a square: for DINOv2 of 512, as published,
    which is 1,297 tokens; for others their own size. The encoder is not modified.
    """
    if clip_vision.model_type == "dinov2" and clip_vision.image_size > _DINO_SIDE:
        clip_vision = copy.copy(clip_vision)
        clip_vision.image_size = _DINO_SIDE
    return clip_vision.encode_image(pictures, crop=False)


def at_full_size(states: torch.Tensor) -> bool:
    """Whether hidden states are those of DINOv2 at its own size, as CLIP Vision Encode makes them."""
    return states.shape[1] == _DINO_TOKENS


def hidden_states(output: Any) -> torch.Tensor:
    """The last hidden states of a CLIP_VISION_OUTPUT, [B, T, W], fp32 on the CPU.

    Raises FusionError if it has none, or values that are not finite.
    """
    hidden = output.last_hidden_state
    if hidden is None or hidden.ndim != 3:
        raise FusionError("appearance has no hidden states: connect CLIP Vision Encode with a CLIP or DINOv2 model")
    return _finite(hidden.float().cpu())


def _finite(encoded: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(encoded).all():
        raise FusionError(
            "the image encoder gives NaN or infinite values: load or render its pictures again, or start ComfyUI "
            "with --fp32-text-enc, which also sets the precision of image encoders"
        )
    return encoded


def fused(
    combiner: Mapping[str, torch.Tensor], clip_vision: Any, source: torch.Tensor, pose: torch.Tensor
) -> torch.Tensor:
    """e_f [B, D] of pictures [B, H, W, 3], without dropout. Raises FusionError for an encoder of another width."""
    of_source, of_pose = embeddings(clip_vision, source), embeddings(clip_vision, pose)
    width, expected = of_source.shape[-1], combiner_width(combiner)
    if width != expected:
        raise FusionError(
            f"this image encoder gives embeddings of {width} numbers and the combiner takes {expected}: load the "
            "encoder that it was trained with in Load CLIP Vision"
        )
    return combine(of_source, of_pose, combiner)


def probe(clip_vision: Any) -> torch.Tensor:
    """An encoder's embedding of one fixed picture, [D], which identifies the encoder in any precision."""
    ramp = torch.linspace(0, 1, 64)
    down, across = torch.meshgrid(ramp, ramp, indexing="ij")
    checks = ((8 * down).floor() + (8 * across).floor()) % 2
    return embeddings(clip_vision, torch.stack([down, across, checks], dim=-1)[None])[0]


def encoder_for(fusion: Fusion, clip_vision: Any) -> Any:
    """The encoder of a fusion, or the connected one if it has none.

    Raises FusionError if neither exists, or the connected one is not that which the combiner was trained with.
    """
    if fusion.encoder is not None:
        return fusion.encoder
    if clip_vision is None:
        raise FusionError(
            "this fusion holds no image encoder, since it was trained with a frozen one: connect that one to "
            "clip_vision"
        )
    if fusion.probe is not None:
        embedded = probe(clip_vision)
        same_width = embedded.shape == fusion.probe.shape
        if same_width and torch.cosine_similarity(embedded, fusion.probe, dim=0) < _SAME_ENCODER:
            raise FusionError(
                "clip_vision is another encoder than the one that the combiner was trained with, though of the same "
                "width: load that one in Load CLIP Vision"
            )
    return clip_vision


def differentiable(clip_vision: Any, module: torch.nn.Module) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """encode(B pictures [1, H, W, 3] of any sizes) -> embeddings [B, D] with a graph, equal to `embeddings`.

    `module` is that of the encoder, loaded. Raises FusionError for an encoder that takes pictures in another way.
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


def rebuild(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """ComfyUI's CLIP_VISION of a description and its weights, in the precision that ComfyUI uses for encoders.

    Raises FusionError, naming the key, if they do not belong together.
    """
    _check_description(config)
    try:
        encoder = comfy.clip_vision.ClipVisionModel(dict(config))
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise FusionError(f"its image encoder has a description that ComfyUI cannot build ({error!r})") from error
    initial = encoder.get_sd()
    for key in sorted(initial.keys() | weights.keys()):
        expected, actual = (tuple(part[key].shape) if key in part else None for part in (initial, weights))
        if expected != actual:
            raise FusionError(f"its image encoder's {key!r} has shape {actual}, where {expected} is expected")
    # If ComfyUI streams weights, it uses these tensors as they are, whatever their precision.
    encoder.load_sd({key: weight.to(initial[key].dtype) for key, weight in weights.items()})
    return encoder


def _check_description(config: Mapping[str, Any]) -> None:
    if config.get("model_type") not in TRAINABLE:
        raise FusionError(f"its image encoder is of type {str(config.get('model_type'))[:40]!r}")
    for key, value in config.items():
        # Numbers decide how much memory is asked for.
        if isinstance(value, int | float) and not 0 <= value <= _LARGEST_NUMBER:
            raise FusionError(f"its image encoder has {key!r} {value}, where 0 to {_LARGEST_NUMBER} is expected")
    needed = ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_attention_heads")
    layers, width, image, patch, heads = numbers = [config.get(key) for key in needed]
    if not all(isinstance(number, int) and number > 0 for number in numbers) or width % heads:
        raise FusionError(f"its image encoder's description lacks a valid {', '.join(needed)}")
    for key in ("image_mean", "image_std"):
        colours = config.get(key, [0.5] * 3)
        three = isinstance(colours, list) and len(colours) == 3
        if not three or not all(isinstance(number, int | float) for number in colours):
            raise FusionError(f"its image encoder has {key!r} {str(colours)[:40]}, where three numbers are expected")
    inner = config.get("intermediate_size", 4 * width)
    if not isinstance(inner, int):
        raise FusionError(f"its image encoder has 'intermediate_size' {str(inner)[:40]}, where a number is expected")
    weights = max(layers * width * max(inner, width), (image // patch) ** 2 * width)
    if layers > _MOST_LAYERS or weights > _MOST_WEIGHTS:
        raise FusionError(f"its image encoder has {layers} layers of width {width}, more than any known one")
