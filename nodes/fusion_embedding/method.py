"""FPDM's parts as plain weights by name, what they compute, and what fits what; it knows no ComfyUI.

Source: arXiv 2412.07333. A combiner turns two embeddings into one (kernels/fusion_embedding.py). A generator has up
to three paths into a UNet: appearance tokens in place of the text's, an embedding that is added to the time's, and
a residual of the pose after the first convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ...kernels import fusion_embedding as kernel
from ..errors import shown_by_name
from ..fingerprint import weights_fingerprint
from .config import PERSON_THRESHOLD

Weights = dict[str, torch.Tensor]

LORA, WHOLE = "lora", "whole"


@shown_by_name
class FusionError(ValueError):
    """Weights, pictures or sizes that do not belong together; the message names the fix."""


@dataclass(frozen=True, eq=False)
class Fusion:
    """What the nodes hand on and files hold; parts that are not trained yet are None.

    combiner, generator: weights by name, as `new_combiner` and `new_generator` name them. encoder: the host's
    CLIP_VISION where stage 1 trained one. unet: weights by name, `unet_kind` LORA (a LORA_MODEL) or WHOLE (the
    weights themselves, under the host's names or diffusers'). probe: where stage 1 froze its encoder, what that gives
    for encoding.probe's picture, [D] on the CPU; files of others have none.
    """

    combiner: Weights | None = None
    encoder: Any = None
    generator: Weights | None = None
    unet: Weights | None = None
    unet_kind: str = ""
    probe: torch.Tensor | None = None

    @property
    def parts(self) -> list[str]:
        """What there is, in words."""
        found = [name for name in ("combiner", "encoder", "generator") if getattr(self, name) is not None]
        return found + ([f"{self.unet_kind} UNet" if self.unet_kind == WHOLE else "LoRA"] if self.unet else [])


@dataclass(frozen=True)
class FusionEmbedding:
    """e_f of each picture, [B, D], of unit length, fp32 on the CPU, and the fingerprint of the combiner it is of."""

    vectors: torch.Tensor
    combiner: str


@dataclass(frozen=True)
class Sizes:
    """Widths that the parts of a generator share with a model: of its appearance encoder's tokens, its own tokens
    (context), e_f (None where that path is off), the time's embedding, and channels after its first convolution.
    """

    encoder: int
    context: int
    embedding: int | None
    time: int
    channels: int


# The combiner


def embedding(fusion: Fusion, vectors: torch.Tensor) -> FusionEmbedding:
    """What a fusion's combiner made."""
    return FusionEmbedding(vectors, weights_fingerprint(fusion.combiner))


def vectors_for(fusion: Fusion, made: FusionEmbedding | None) -> torch.Tensor | None:
    """e_f [B, D] for a fusion's generator, or None where none is given. Raises FusionError where it is not for it."""
    if made is None:
        return None
    if fusion.generator is not None and "embedding.first.weight" not in fusion.generator:
        raise FusionError("this fusion was trained without a fusion embedding: leave fusion_embed free")
    if fusion.combiner is not None and made.combiner != weights_fingerprint(fusion.combiner):
        raise FusionError(
            "fusion_embed is of another combiner than this fusion's: connect one fusion to both Combine Fusion and "
            "Apply Fusion"
        )
    return made.vectors


def new_combiner(width: int, projection: int, hidden: int, generator: torch.Generator) -> Weights:
    """A combiner's first weights for embeddings of `width`, fp32, uniform as linear layers begin."""
    shapes = {
        "pose_projection": (projection, width), "source_projection": (projection, width),
        "gate_hidden": (hidden, 2 * projection), "gate": (1, hidden),
        "mixing": (hidden, 2 * projection), "output": (width, hidden),
    }
    return dict(_begun({name: shapes[name] for name in kernel.LAYERS}, generator))


def combiner_width(weights: Mapping[str, torch.Tensor]) -> int:
    """D of the embeddings that a combiner takes and gives. Raises FusionError, naming the first bad key."""
    projection, width = _matrix(weights, "pose_projection.weight")
    hidden, _ = _matrix(weights, "mixing.weight")
    expected: dict[str, tuple[int, ...]] = {}
    for name, out, given in (
        ("pose_projection", projection, width), ("source_projection", projection, width),
        ("gate_hidden", hidden, 2 * projection), ("gate", 1, hidden),
        ("mixing", hidden, 2 * projection), ("output", width, hidden),
    ):
        expected |= {f"{name}.weight": (out, given), f"{name}.bias": (out,)}
    _check_all(weights, expected, "combiner")
    return width


# The generator


def new_generator(
    sizes: Sizes, hidden: int, pose_channels: Sequence[int], generator: torch.Generator
) -> Weights:
    """A generator's first weights, fp32. Last layers of the embedding and the pose path are 0, so that both start as
    if they were not there; published for the pose, ours for the embedding.
    """
    shapes = {"appearance.first": (hidden, sizes.encoder), "appearance.second": (sizes.context, hidden)}
    if sizes.embedding is not None:
        shapes |= {
            "embedding.first": (sizes.embedding, sizes.embedding), "embedding.second": (sizes.time, sizes.embedding)
        }
    shapes["pose.conv_in"] = (pose_channels[0], 3, 3, 3)
    for i, (given, out) in enumerate(zip(pose_channels, pose_channels[1:], strict=False)):
        shapes[f"pose.blocks.{2 * i}"] = (given, given, 3, 3)
        shapes[f"pose.blocks.{2 * i + 1}"] = (out, given, 3, 3)
    shapes["pose.conv_out"] = (sizes.channels, pose_channels[-1], 3, 3)
    weights = dict(_begun(shapes, generator))
    weights |= {"appearance.norm.weight": torch.ones(hidden), "appearance.norm.bias": torch.zeros(hidden)}
    for name in ("embedding.second", "pose.conv_out"):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in weights:
                weights[f"{name}.{part}"].zero_()
    return weights


def generator_sizes(weights: Mapping[str, torch.Tensor]) -> Sizes:
    """What a generator fits. Raises FusionError, naming the first bad key."""
    hidden, encoder = _matrix(weights, "appearance.first.weight")
    context, _ = _matrix(weights, "appearance.second.weight")
    expected = {
        "appearance.first.weight": (hidden, encoder), "appearance.first.bias": (hidden,),
        "appearance.second.weight": (context, hidden), "appearance.second.bias": (context,),
        "appearance.norm.weight": (hidden,), "appearance.norm.bias": (hidden,),
    }
    embedding = time = None
    if any(key.startswith("embedding.") for key in weights):
        inner, embedding = _matrix(weights, "embedding.first.weight")
        time, _ = _matrix(weights, "embedding.second.weight")
        expected |= {
            "embedding.first.weight": (inner, embedding), "embedding.first.bias": (inner,),
            "embedding.second.weight": (time, inner), "embedding.second.bias": (time,),
        }
        if "embedding.norm.weight" in weights:
            expected |= {"embedding.norm.weight": (inner,), "embedding.norm.bias": (inner,)}
    blocks = _pose_blocks(weights)
    given = _outputs(weights, "pose.conv_in.weight")
    expected |= {"pose.conv_in.weight": (given, 3, 3, 3), "pose.conv_in.bias": (given,)}
    for i in range(blocks):
        out = _outputs(weights, f"pose.blocks.{i}.weight") if i % 2 else given
        expected |= {f"pose.blocks.{i}.weight": (out, given, 3, 3), f"pose.blocks.{i}.bias": (out,)}
        given = out
    channels = _outputs(weights, "pose.conv_out.weight")
    expected |= {"pose.conv_out.weight": (channels, given, 3, 3), "pose.conv_out.bias": (channels,)}
    _check_all(weights, expected, "generator")
    return Sizes(encoder, context, embedding, time or 0, channels)


def pose_reduction(weights: Mapping[str, torch.Tensor]) -> int:
    """How many pixels of a pose become one place of its residual, along each side."""
    return 2 ** (_pose_blocks(weights) // 2)


def appearance_tokens(weights: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Tokens [B, T, context] of an appearance encoder's last hidden states [B, T, encoder], class token included."""
    return _projection(weights, "appearance", states)


def class_embedding(weights: Mapping[str, torch.Tensor], fused: torch.Tensor) -> torch.Tensor:
    """What is added to the time's embedding, [B, time], of e_f [B, D]; an e_f of zeros is one that is left out."""
    return _projection(weights, "embedding", fused)


def pose_residual(weights: Mapping[str, torch.Tensor], pose: torch.Tensor) -> torch.Tensor:
    """What is added after the first convolution, [B, channels, H / r, W / r], of drawings [B, 3, H, W] in 0..1.

    The layers and their names are those of diffusers' ControlNetConditioningEmbedding.
    """

    def convolved(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=1)

    x = functional.silu(convolved("pose.conv_in", pose))
    for i in range(_pose_blocks(weights)):
        x = functional.silu(convolved(f"pose.blocks.{i}", x, stride=1 + i % 2))
    return convolved("pose.conv_out", x)


def _projection(weights: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Linear, GELU, layer norm where there is one, linear."""
    x = functional.gelu(functional.linear(x, weights[f"{name}.first.weight"], weights[f"{name}.first.bias"]))
    scale = weights.get(f"{name}.norm.weight")
    if scale is not None:
        x = functional.layer_norm(x, scale.shape, scale, weights[f"{name}.norm.bias"])
    return functional.linear(x, weights[f"{name}.second.weight"], weights[f"{name}.second.bias"])


# Pictures and batches


def check_poses(pose: torch.Tensor, name: str = "pose") -> None:
    """Raises FusionError, naming the picture, where a drawing [B, H, W, 3] in 0..1 has nobody on it or no colours."""
    for i, drawn in enumerate(pose[..., :3].flatten(1, 2)):  # without alpha, which is 1 on black
        of = f" {i + 1} of {len(pose)}" if len(pose) > 1 else ""
        if not _spread(drawn, 0) > PERSON_THRESHOLD:
            raise FusionError(
                f"{name}{of} shows no person: draw a skeleton of a picture in which a pose detector finds one, or "
                "take the pose of the Puppet node"
            )
        # A grey file comes with three equal channels.
        if not _spread(drawn, 1) > PERSON_THRESHOLD:
            raise FusionError(
                f"{name}{of} is grey: the colours tell the limbs apart: connect the coloured OpenPose drawing"
            )


def _spread(drawn: torch.Tensor, dim: int) -> float:
    """The largest difference along places (0) or channels (1) of a drawing [H W, C]."""
    return float((drawn.amax(dim) - drawn.amin(dim)).max())


def rows(counts: Mapping[str, int]) -> int:
    """The batch that inputs of these lengths make: equal ones, or one for all. Raises FusionError, naming them."""
    most = max(counts.values())
    if not most or any(count not in (1, most) for count in counts.values()):
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise FusionError(f"the numbers of pictures differ ({listed}): give equal numbers, or one for all")
    return most


def expanded(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """One row for all, or the rows as they are."""
    return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor


# Shapes


def _begun(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight and bias of each layer, uniform within 1 / sqrt(inputs), as PyTorch's layers begin."""
    for name, shape in shapes.items():
        bound = math.prod(shape[1:]) ** -0.5
        yield f"{name}.weight", torch.empty(shape).uniform_(-bound, bound, generator=generator)
        yield f"{name}.bias", torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)


def _pose_blocks(weights: Mapping[str, torch.Tensor]) -> int:
    count = sum(key.startswith("pose.blocks.") and key.endswith(".weight") for key in weights)
    if count % 2:
        raise FusionError(f"its pose path has {count} blocks, and they come in pairs")
    return count


def _tensor(weights: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in weights:
        raise FusionError(f"it has no {key!r}")
    return weights[key]


def _outputs(weights: Mapping[str, torch.Tensor], key: str) -> int:
    shape = _tensor(weights, key).shape
    if not shape:
        raise FusionError(f"its {key!r} is a single number, where a convolution is expected")
    return shape[0]


def _matrix(weights: Mapping[str, torch.Tensor], key: str) -> tuple[int, int]:
    shape = _tensor(weights, key).shape
    if len(shape) != 2:
        raise FusionError(f"its {key!r} has shape {tuple(shape)}, where a matrix is expected")
    return shape[0], shape[1]


def _check_all(weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], part: str) -> None:
    for key, shape in expected.items():
        found = tuple(_tensor(weights, key).shape)
        if found != shape:
            raise FusionError(f"its {key!r} has shape {found}, where {shape} is expected")
    foreign = sorted(set(weights) - set(expected))
    if foreign:
        raise FusionError(f"it has {foreign[0]!r}, which is no part of a {part}")
