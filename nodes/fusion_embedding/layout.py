"""Weights and sizes of a combiner and a generator; apart from method.py, since files are checked by them alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels.fusion_embedding import LAYERS
from ..errors import shown_by_name

Weights = dict[str, torch.Tensor]
PATHS = ("appearance.", "embedding.", "embedding_tokens.", "pose.")  # how the keys of a generator's parts begin


@shown_by_name
class FusionError(ValueError):
    """Weights, pictures or sizes that do not belong together; the message names the fix."""


@dataclass(frozen=True)
class Sizes:
    """Widths that a generator shares with its encoders and its UNet: of the appearance encoder's tokens, the UNet's
    tokens (context), e_f (None if that path is off), the time's embedding, and the first convolution's channels;
    and how many tokens e_f has of its own.
    """

    encoder: int
    context: int
    embedding: int | None
    time: int
    channels: int
    embedding_tokens: int = 0


def new_combiner(width: int, projection: int, hidden: int, generator: torch.Generator) -> Weights:
    """A combiner's initial weights for embeddings of `width`, fp32, uniform as PyTorch's linear layers."""
    return dict(_initial(_combiner_shapes(width, projection, hidden), generator))


def combiner_width(weights: Mapping[str, torch.Tensor]) -> int:
    """D of a combiner's embeddings. Raises FusionError, naming the first bad key."""
    projection, width = _matrix(weights, "pose_projection.weight")
    hidden, _ = _matrix(weights, "mixing.weight")
    _check_shapes(weights, _with_biases(_combiner_shapes(width, projection, hidden)), "combiner")
    return width


def _combiner_shapes(width: int, projection: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Of each layer's weight, in the kernel's order."""
    shapes = (
        (projection, width), (projection, width), (hidden, 2 * projection), (1, hidden), (hidden, 2 * projection),
        (width, hidden),
    )
    return dict(zip(LAYERS, shapes, strict=True))


def new_generator(sizes: Sizes, hidden: int, pose_channels: Sequence[int], generator: torch.Generator) -> Weights:
    """A generator's initial weights, fp32. The last layers of the embedding and the pose path are 0, so that at first
    neither acts; published for the pose, ours for the embedding.
    """
    weights = dict(_initial(_generator_shapes(sizes, hidden, sizes.embedding, pose_channels), generator))
    norms = {"appearance.norm": hidden}
    if sizes.embedding_tokens:
        norms["embedding_tokens.norm"] = sizes.context
    for name, width in norms.items():
        weights |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    for name in ("embedding.second", "pose.conv_out"):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in weights:
                weights[f"{name}.{part}"].zero_()
    return weights


def begun_with(new: Weights, earlier: Mapping[str, torch.Tensor], sizes: Sizes) -> Weights:
    """A generator with the paths that `earlier` has, copied to fp32, and those of `new` that it lacks.

    Raises FusionError, naming the fix, if those have not the `sizes` that training asks for.
    """
    kept = tuple(path for path in PATHS if any(key.startswith(path) for key in earlier))
    weights = {key: weight for key, weight in new.items() if not key.startswith(kept)}
    weights |= {key: weight.detach().to("cpu", torch.float32, copy=True) for key, weight in earlier.items()}
    found = generator_sizes(weights)
    model = "connect the model that the fusion was trained for"
    for name, what, fix in (
        ("encoder", "a width of the appearance's tokens of", "connect the appearance_encoder of its training"),
        ("context", "a width of the UNet's tokens of", model),
        ("channels", "a first convolution of width", model),
        ("embedding", "a width of the fusion embedding of", "connect a fusion with its generator's own combiner"),
        ("embedding_tokens", "a number of embedding tokens of", f"set embedding_tokens to {found.embedding_tokens}"),
    ):
        if (had := getattr(found, name)) != (asked := getattr(sizes, name)):
            raise FusionError(
                f"train_further is on and the fusion's generator has {what} {had}, not {asked or 'none'}: {fix}"
            )
    return weights


def generator_sizes(weights: Mapping[str, torch.Tensor]) -> Sizes:
    """The sizes of a generator. Raises FusionError, naming the first bad key."""
    hidden, encoder = _matrix(weights, "appearance.first.weight")
    context, _ = _matrix(weights, "appearance.second.weight")
    norms = {"appearance.norm": hidden}
    inner = embedding = None
    time = tokens = 0
    if any(key.startswith("embedding_tokens.") for key in weights):
        rows, embedding = _matrix(weights, "embedding_tokens.projection.weight")
        tokens = max(1, rows // context)
        norms["embedding_tokens.norm"] = context
    if any(key.startswith("embedding.") for key in weights):
        inner, embedding = _matrix(weights, "embedding.first.weight")
        time, _ = _matrix(weights, "embedding.second.weight")
        if "embedding.norm.weight" in weights:
            norms["embedding.norm"] = inner
    blocks = range(1, pose_blocks(weights), 2)
    pose_channels = [_out_channels(weights, name) for name in ("pose.conv_in", *(f"pose.blocks.{i}" for i in blocks))]
    sizes = Sizes(encoder, context, embedding, time, _out_channels(weights, "pose.conv_out"), tokens)
    shapes = _with_biases(_generator_shapes(sizes, hidden, inner, pose_channels))
    shapes |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    _check_shapes(weights, shapes, "generator")
    return sizes


def _generator_shapes(
    sizes: Sizes, hidden: int, inner: int | None, pose_channels: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Of each layer's weight but the norms', in the order in which they are initialised."""
    shapes = {"appearance.first": (hidden, sizes.encoder), "appearance.second": (sizes.context, hidden)}
    if sizes.embedding is not None:
        shapes |= {"embedding.first": (inner, sizes.embedding), "embedding.second": (sizes.time, inner)}
    if sizes.embedding_tokens:
        shapes["embedding_tokens.projection"] = (sizes.embedding_tokens * sizes.context, sizes.embedding)
    shapes["pose.conv_in"] = (pose_channels[0], 3, 3, 3)
    for i, (before, after) in enumerate(zip(pose_channels, pose_channels[1:], strict=False)):
        shapes[f"pose.blocks.{2 * i}"] = (before, before, 3, 3)
        shapes[f"pose.blocks.{2 * i + 1}"] = (after, before, 3, 3)
    shapes["pose.conv_out"] = (sizes.channels, pose_channels[-1], 3, 3)
    return shapes


def pose_reduction(weights: Mapping[str, torch.Tensor]) -> int:
    """How many pixels of a pose become one cell of its residual, along each side."""
    return 2 ** (pose_blocks(weights) // 2)


def _initial(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight and bias of each layer, uniform within 1 / sqrt(inputs), as PyTorch initialises them."""
    for name, shape in shapes.items():
        bound = math.prod(shape[1:]) ** -0.5
        yield f"{name}.weight", torch.empty(shape).uniform_(-bound, bound, generator=generator)
        yield f"{name}.bias", torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)


def pose_blocks(weights: Mapping[str, torch.Tensor]) -> int:
    """How many convolutions its pose path has between the first and the last; every second one halves the sides."""
    count = sum(key.startswith("pose.blocks.") and key.endswith(".weight") for key in weights)
    if count % 2:
        raise FusionError(f"its pose path has {count} blocks, where an even number is expected")
    return count


def _tensor(weights: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in weights:
        raise FusionError(f"it has no {key!r}")
    return weights[key]


def _out_channels(weights: Mapping[str, torch.Tensor], layer: str) -> int:
    shape = _tensor(weights, f"{layer}.weight").shape
    if not shape:
        raise FusionError(f"its '{layer}.weight' is a single number, where a convolution is expected")
    return shape[0]


def _matrix(weights: Mapping[str, torch.Tensor], key: str) -> tuple[int, int]:
    shape = _tensor(weights, key).shape
    if len(shape) != 2:
        raise FusionError(f"its {key!r} has shape {tuple(shape)}, where a matrix is expected")
    return shape[0], shape[1]


def _with_biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of each layer's weight and bias, by key."""
    return {f"{name}.{part}": shape if part == "weight" else shape[:1] for name, shape in shapes.items()
            for part in ("weight", "bias")}


def _check_shapes(weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], part: str) -> None:
    for key, shape in expected.items():
        actual = tuple(_tensor(weights, key).shape)
        if actual != shape:
            raise FusionError(f"its {key!r} has shape {actual}, where {shape} is expected")
    foreign = sorted(set(weights) - set(expected))
    if foreign:
        raise FusionError(f"it has {foreign[0]!r}, which is not part of a {part}")
