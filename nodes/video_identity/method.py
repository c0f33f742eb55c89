"""Video identity: the adapter, what a reference is, its tokens' positions and weights.

Source: Stand-In (arXiv 2508.07901); the attention itself is in kernels/restricted_attention.py.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..consent.record import ConsentRecord
from ..errors import shown_by_name
from ..inputs import frame_masks, latents
from ..inputs.ranges import select_numbers, sigma_range
from .config import VideoIdentityConfig

PROJECTIONS = ("q", "k", "v")
_PREFIX = r"(?:model\.)?(?:diffusion_model\.)?"
_KEY = re.compile(_PREFIX + r"(blocks\.(\d{1,4})\.self_attn\.([qkv])_loras\.(down|up)\.weight)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Ours, by looking at the theatre: of references of 1, 1.8, 2.3, 4 and 28 times a frame's size, the first two keep a
# puppet, the third a part of it, and beside the others there is none.
_MOST_FRAMES = 2


@shown_by_name
class AdapterError(ValueError):
    """Weights of no video identity adapter, or of one for another model; names key, expected and actual shape."""


def _saveable(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or a copy that autograd can save: a graph may train a model that shows a reference."""
    return weight.clone() if weight.is_inference() and torch.is_grad_enabled() else weight


# Without a repr of all weights: ComfyUI writes a failing node's inputs into its report.
@dataclass(frozen=True, eq=False, repr=False)
class ProjectionUpdate:
    """What is added to one projection: up(down(x)), without a scale; B_q A_q X_I in the paper.

    down: [rank, width]; up: [width, rank].
    """

    down: torch.Tensor
    up: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x, _saveable(self.down.to(x)))
        return torch.nn.functional.linear(hidden, _saveable(self.up.to(x)))


@dataclass(frozen=True, eq=False, repr=False)
class BlockUpdates:
    """What is added to the projections of one block, for the reference's tokens alone."""

    q: ProjectionUpdate
    k: ProjectionUpdate
    v: ProjectionUpdate


@dataclass(frozen=True, eq=False, repr=False)
class VideoAdapter:
    """The updates of every block, in order; the fingerprint of the base model, if it is known; and the consent to
    the pictures, if there is a record. Compared by identity: loading a file twice gives two adapters.
    """

    blocks: tuple[BlockUpdates, ...]
    base: str = ""
    consent: ConsentRecord | None = None

    @property
    def width(self) -> int:
        """Width of the transformer that it belongs to."""
        return self.blocks[0].q.down.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights under their published names."""
        return {
            weight_key(i, name, part): getattr(getattr(block, name), part)
            for i, block in enumerate(self.blocks) for name in PROJECTIONS for part in ("down", "up")
        }

    def check(self, width: int, blocks: int) -> None:
        """Raises AdapterError, naming the first wrong key, unless it fits a model of this width and depth."""
        tensors = self.tensors()
        for i in range(max(blocks, len(self.blocks))):
            key = weight_key(i, "q", "down")
            if i >= blocks:
                raise AdapterError(_misfit(key, "no such key", tuple(tensors[key].shape), width, blocks))
            if key not in tensors:
                raise AdapterError(_misfit(key, f"(rank, {width})", "nothing", width, blocks))
        for key, tensor in tensors.items():
            side = 1 if ".down." in key else 0
            if tensor.shape[side] != width:
                expected = f"(rank, {width})" if side else f"({width}, rank)"
                raise AdapterError(_misfit(key, expected, tuple(tensor.shape), width, blocks))


def new_adapter(width: int, blocks: int, rank: int, seed: Callable[[int], int]) -> VideoAdapter:
    """An untrained adapter of fp32 parameters: down from N(0, 1 / rank), as published for rank 128; up is 0.

    seed(i) is the seed of the i-th projection, counting q, k, v of each block in turn.
    """
    updates = []
    for i in range(blocks):
        projections = {}
        for j, name in enumerate(PROJECTIONS):
            generator = torch.Generator().manual_seed(seed(len(PROJECTIONS) * i + j))
            down = torch.randn(rank, width, generator=generator) / rank
            up = torch.zeros(width, rank)
            projections[name] = ProjectionUpdate(torch.nn.Parameter(down), torch.nn.Parameter(up))
        updates.append(BlockUpdates(**projections))
    return VideoAdapter(tuple(updates))


def weight_key(block: int, projection: str, part: str) -> str:
    """The published name of one matrix."""
    return f"blocks.{block}.self_attn.{projection}_loras.{part}.weight"


def _misfit(key: str, expected: Any, actual: Any, width: int, blocks: int) -> str:
    return (
        f"this adapter belongs to another model: {key} should be {expected} and is {actual}. Load the adapter that "
        f"was trained for a model of {blocks} blocks and width {width}, or connect the model that it was trained for"
    )


def adapter_from(tensors: Mapping[str, torch.Tensor]) -> VideoAdapter:
    """The adapter with these weights, of any rank, in fp16, bf16 or fp32, their names with or without a model prefix.

    Raises AdapterError, naming key, expected and actual shape.
    """
    matrices: dict[tuple[int, str, str], torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{key} of shape {tuple(tensor.shape)} is not a weight of a video identity adapter, which holds only "
                f"keys such as {weight_key(0, 'q', 'down')} of shape (rank, width): load a plain LoRA with Load LoRA"
            )
        name, block, projection, part = match[1], int(match[2]), match[3], match[4]
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.dtype not in _DTYPES:
            expected = "(rank, width)" if part == "down" else "(width, rank)"
            raise AdapterError(
                f"{key} should be {expected} in fp16, bf16 or fp32 and is {tuple(tensor.shape)} in {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{key} of shape {tuple(tensor.shape)} holds NaN or infinite values")
        if (block, projection, part) in matrices:
            raise AdapterError(f"{name} is in it twice, with and without a prefix")
        matrices[block, projection, part] = tensor
    if not matrices:
        raise AdapterError("it holds no weights")
    count = 1 + max(block for block, _, _ in matrices)
    (_, _, part), matrix = next(iter(matrices.items()))
    width = matrix.shape[1 if part == "down" else 0]
    return VideoAdapter(tuple(
        BlockUpdates(**{name: _projection_update(matrices, i, name, width) for name in PROJECTIONS})
        for i in range(count)
    ))


def size_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """Blocks and width of the adapter whose weights have these shapes, or None if one is no adapter's."""
    matches = [_KEY.fullmatch(key) for key in shapes]
    if not all(matches) or not all(len(shape) == 2 for shape in shapes.values()):
        return None
    down = next((shape for match, shape in zip(matches, shapes.values(), strict=True) if match[4] == "down"), None)
    return down and (1 + max(int(match[2]) for match in matches), down[1])


def _projection_update(matrices: Mapping, block: int, projection: str, width: int) -> ProjectionUpdate:
    pair = {part: matrices.get((block, projection, part)) for part in ("down", "up")}
    rank = next((m.shape[0 if part == "down" else 1] for part, m in pair.items() if m is not None), "rank")
    for part, matrix in pair.items():
        expected = (rank, width) if part == "down" else (width, rank)
        shape = None if matrix is None else tuple(matrix.shape)
        if shape != expected:
            key = weight_key(block, projection, part)
            raise AdapterError(f"{key} should be {expected} and is {shape or 'nothing'}")
    return ProjectionUpdate(**pair)


@dataclass(frozen=True, eq=False, repr=False)
class VideoReference:
    """One person's picture and how the video sees it.

    latent: [1, C, 1, h, w] as VAE Encode returns it; mask: [F, H, W] in 0..1, or None; digest: of the latent.
    """

    adapter: VideoAdapter
    latent: torch.Tensor
    config: VideoIdentityConfig
    mask: torch.Tensor | None = None
    digest: str = ""

    @property
    def off(self) -> bool:
        """True where no token of any step would see the reference."""
        return self.config.strength == 0 or (self.mask is not None and not self.mask.any())


def video_reference(
    adapter: VideoAdapter, latent: torch.Tensor, config: VideoIdentityConfig, mask: torch.Tensor | None = None
) -> VideoReference:
    """A checked copy of what a graph connects, on the CPU in fp32.

    latent: [1, C, h, w] or [1, C, 1, h, w]; mask: [H, W] or [F, H, W]. Raises ValueError, naming the input.
    """
    latents.check_picture(latent, "reference")
    if latent.ndim == 4:
        latent = latent.unsqueeze(2)
    if latent.shape[0] != 1 or latent.shape[2] != 1:
        raise ValueError(
            f"reference holds {latent.shape[0]} latents of {latent.shape[2]} frames: connect VAE Encode of one "
            "picture to `reference`, and chain another Apply Video Identity for another person"
        )
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.numel() == 0:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: connect one MASK, or one per frame")
        latents.check_finite(mask, "mask", "connect another MASK")
        mask = mask.detach().float().clamp(0, 1).cpu()
    latent = latent.detach().cpu().float().clone(memory_format=torch.contiguous_format)
    digest = hashlib.sha256(str(tuple(latent.shape)).encode() + latent.numpy().tobytes()).hexdigest()
    return VideoReference(adapter, latent, config, mask, digest)


def doubts(references: Sequence[VideoReference], shape: Sequence[int]) -> list[str]:
    """What to tell of references beside latents of shape [B, C, T, H, W]: one far too large, or no video at all."""
    lines = []
    times = max(math.prod(reference.latent.shape[-2:]) for reference in references) / math.prod(shape[-2:])
    if times > _MOST_FRAMES:
        lines.append(
            f"the reference is {times:.1f} times as large as a frame of the video, which may then show little of "
            "anybody: set size in Prepare Reference near the video's height or width"
        )
    if shape[0] > 1 and shape[2] == 1:
        lines.append(
            f"the latents hold {shape[0]} pictures and no video, so each is made by itself: for one video connect an "
            "empty latent of a video"
        )
    return lines


def reference_positions(height: int, width: int, video_height: float, video_width: float) -> torch.Tensor:
    """Positions (t, h, w) of a reference's tokens, [1, height * width, 3], in patches; the video begins at 0.

    The paper's Conditional Position Mapping: t = -1, h from H_V and w from W_V, so that no token shares a frame, row
    or column with the video.
    """
    rows = video_height + torch.arange(height, dtype=torch.float32)
    columns = video_width + torch.arange(width, dtype=torch.float32)
    h, w = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(h, -1.0), h, w], dim=-1).reshape(1, -1, 3)


def is_active(reference: VideoReference, model_sampling: Any, sigma: torch.Tensor) -> bool:
    """True where the reference acts at this noise level, the highest of those in `sigma`."""
    config = reference.config
    steps = sigma_range(model_sampling, config.start_percent, config.end_percent)
    return config.every_step or float(sigma.max()) in steps


def selected_blocks(config: VideoIdentityConfig, count: int) -> frozenset[int]:
    """The blocks in which the reference is seen. Raises ValueError if a model of `count` blocks lacks one."""
    return select_numbers("blocks", config.blocks, count)


def token_weights(
    mask: torch.Tensor, frames: int, height: int, width: int, patch: tuple[int, int], leading: int = 0
) -> torch.Tensor:
    """The mask's mean over each token's part of the video: [frames, rows, columns]; 0 and 1 stay exact.

    mask: [F, H, W] in 0..1, F as `frame_masks.by_latent_frame` takes it; frames, height and width: of the whole video
    latent. Of its frames the `leading` ones are a picture beside the video, which a mask of the video does not have:
    they get its mean. Raises ValueError for another F.
    """
    cells = torch.nn.functional.adaptive_avg_pool2d(mask.float().unsqueeze(1), (height, width))
    # The model pads beyond the edge; the cells there repeat its value.
    padding = (0, -width % patch[1], 0, -height % patch[0])
    cells = torch.nn.functional.pad(cells, padding, mode="replicate")
    tokens = torch.nn.functional.avg_pool2d(cells, patch).squeeze(1)
    if len(tokens) in (frames, frame_masks.frame_count(frames)):  # a mask of them all
        leading = 0
    frames -= leading
    video = frame_masks.by_latent_frame(tokens, frames).expand(frames, -1, -1)
    return torch.cat([video.mean().expand(leading, *video.shape[1:]), video]) if leading else video


# Training


def training_sigmas(levels: int = 1000, shift: float = 5.0) -> torch.Tensor:
    """The noise levels [levels] of the official repository's training, rising to 1: an even grid, shifted."""
    even = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    return (shift * even / (1 + (shift - 1) * even)).float()


def bell_weight(sigma: torch.Tensor) -> torch.Tensor:
    """The official repository's weight of noise levels [B] in 0..1: a bell around 0.5, 0 at its ends, mean 1."""

    def bell(x: torch.Tensor) -> torch.Tensor:
        return (-2 * (x - 0.5).square()).exp() - math.exp(-0.5)

    return bell(sigma) / bell(training_sigmas().to(sigma)).mean()
