"""Video identity: a reference image's keys and values in every block of a Wan transformer.

Source: Stand-In (arXiv 2508.07901); the attention itself is in kernels/restricted_attention.py. The reference sees
neither text nor the video nor its noise level, so one pass over it serves every step and both halves of CFG.
"""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from ..errors import shown_by_name
from .config import VideoIdentityConfig, parse_blocks

Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]

PROJECTIONS = ("q", "k", "v")
_PREFIX = r"(?:model\.)?(?:diffusion_model\.)?"
_KEY = re.compile(_PREFIX + r"(blocks\.(\d{1,4})\.self_attn\.([qkv])_loras\.(down|up)\.weight)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@shown_by_name
class AdapterError(ValueError):
    """Weights that are no video identity adapter, or one for another model; names key, expected and found shape."""


def _saveable(weight: torch.Tensor) -> torch.Tensor:
    """Itself, or a copy that autograd may keep: somebody may train a model that shows a reference."""
    return weight.clone() if weight.is_inference() and torch.is_grad_enabled() else weight


# Without their own repr: the host writes a failing node's inputs into its report.
@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """up(down(x)), without a scale: B_q A_q X_I in the paper. down: [rank, in], up: [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x, _saveable(self.down.to(x)))
        return torch.nn.functional.linear(hidden, _saveable(self.up.to(x)))


@dataclass(frozen=True, eq=False, repr=False)
class BlockUpdates:
    """What the image branch adds to one block's projections."""

    q: LowRank
    k: LowRank
    v: LowRank


@dataclass(frozen=True, eq=False, repr=False)
class VideoAdapter:
    """The updates of every block, in order. One object is one adapter: two loads of a file are two."""

    blocks: tuple[BlockUpdates, ...]

    @property
    def width(self) -> int:
        """Channels of the model it belongs to."""
        return self.blocks[0].q.down.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights under their published names."""
        return {
            weight_key(i, name, part): getattr(getattr(block, name), part)
            for i, block in enumerate(self.blocks) for name in PROJECTIONS for part in ("down", "up")
        }

    def check(self, width: int, blocks: int) -> None:
        """Raises AdapterError, naming the first key, where a model of this width and depth needs another adapter."""
        found = self.tensors()
        for i in range(max(blocks, len(self.blocks))):
            key = weight_key(i, "q", "down")
            if i >= blocks:
                raise AdapterError(_misfit(key, "no such key", tuple(found[key].shape), width, blocks))
            if key not in found:
                raise AdapterError(_misfit(key, f"(rank, {width})", "nothing", width, blocks))
        for key, tensor in found.items():
            side = 1 if ".down." in key else 0
            if tensor.shape[side] != width:
                expected = f"(rank, {width})" if side else f"({width}, rank)"
                raise AdapterError(_misfit(key, expected, tuple(tensor.shape), width, blocks))


def new_adapter(width: int, blocks: int, rank: int, seed: Callable[[int], int]) -> VideoAdapter:
    """An untrained adapter of fp32 parameters: down from N(0, 1 / rank), as published for rank 128; up is 0.

    seed(i) is the seed of the i-th projection, counting q, k, v of each block in turn.
    """
    made = []
    for i in range(blocks):
        pairs = {}
        for j, name in enumerate(PROJECTIONS):
            generator = torch.Generator().manual_seed(seed(len(PROJECTIONS) * i + j))
            down = torch.randn(rank, width, generator=generator) / rank
            pairs[name] = LowRank(torch.nn.Parameter(down), torch.nn.Parameter(torch.zeros(width, rank)))
        made.append(BlockUpdates(**pairs))
    return VideoAdapter(tuple(made))


def weight_key(block: int, projection: str, part: str) -> str:
    """The published name of one matrix."""
    return f"blocks.{block}.self_attn.{projection}_loras.{part}.weight"


def _misfit(key: str, expected: Any, found: Any, width: int, blocks: int) -> str:
    return (
        f"this adapter belongs to another model: {key} should be {expected} and is {found}. Load the adapter that "
        f"was made for a model of {blocks} blocks and width {width}, or connect the model that it was made for"
    )


def adapter_from(tensors: Mapping[str, torch.Tensor]) -> VideoAdapter:
    """The adapter that these weights are, of any rank, in fp16, bf16 or fp32, with or without a model prefix.

    Raises AdapterError, naming key, expected and found shape.
    """
    matrices: dict[tuple[int, str, str], torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{key} of shape {tuple(tensor.shape)} belongs to no video identity adapter, which holds "
                f"{weight_key(0, 'q', 'down')} of shape (rank, width) and its like alone: load a plain LoRA with "
                "Load LoRA instead"
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
            raise AdapterError(f"{name} stands there twice, with and without a prefix")
        matrices[block, projection, part] = tensor
    if not matrices:
        raise AdapterError("there are no weights in it")
    count = 1 + max(block for block, _, _ in matrices)
    width = next(iter(matrices.values())).shape[1 if next(iter(matrices))[2] == "down" else 0]
    blocks = []
    for i in range(count):
        pairs = {name: _low_rank(matrices, i, name, width) for name in PROJECTIONS}
        blocks.append(BlockUpdates(**pairs))
    return VideoAdapter(tuple(blocks))


def _low_rank(matrices: Mapping, block: int, projection: str, width: int) -> LowRank:
    found = {part: matrices.get((block, projection, part)) for part in ("down", "up")}
    rank = next((m.shape[0 if part == "down" else 1] for part, m in found.items() if m is not None), "rank")
    for part, matrix in found.items():
        expected = (rank, width) if part == "down" else (width, rank)
        shape = None if matrix is None else tuple(matrix.shape)
        if shape != expected:
            key = weight_key(block, projection, part)
            raise AdapterError(f"{key} should be {expected} and is {shape or 'nothing'}")
    return LowRank(found["down"], found["up"])


@dataclass(frozen=True, eq=False, repr=False)
class Identity:
    """One reference and how it acts.

    latent: [1, C, 1, h, w] as VAE Encode gives it; mask: [F, H, W] in 0..1, or None.
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


def identity(
    adapter: VideoAdapter, latent: torch.Tensor, config: VideoIdentityConfig, mask: torch.Tensor | None = None
) -> Identity:
    """Check what a graph connects, and name the reference by its content. Raises ValueError, naming the input."""
    if latent.is_nested or latent.ndim not in (4, 5):
        raise ValueError("reference is no image latent: connect VAE Encode of one picture to `reference`")
    if latent.ndim == 4:
        latent = latent.unsqueeze(2)
    if latent.shape[0] != 1 or latent.shape[2] != 1 or latent.numel() == 0:
        raise ValueError(
            f"reference holds {latent.shape[0]} latents of {latent.shape[2]} frames: connect VAE Encode of one "
            "picture to `reference`, and chain another Apply node for another person"
        )
    if not torch.isfinite(latent).all():
        raise ValueError("reference holds NaN or infinite values: encode it again, with the VAE in fp32")
    if not latent.any():
        raise ValueError("reference is all zero, as empty latents are: connect VAE Encode of one picture")
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.numel() == 0:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: connect one MASK, or one for each frame")
        if not torch.isfinite(mask).all():
            raise ValueError("mask holds NaN or infinite values: make it again")
        mask = mask.detach().float().clamp(0, 1).cpu()
    latent = latent.detach().cpu().float().clone(memory_format=torch.contiguous_format)
    content = hashlib.sha256(str(tuple(latent.shape)).encode() + latent.numpy().tobytes()).hexdigest()
    return Identity(adapter, latent, config, mask, content)


def reference_positions(height: int, width: int, video_height: float, video_width: float) -> torch.Tensor:
    """Positions (t, h, w) of a reference's tokens, [1, height * width, 3], in patches; the video begins at 0.

    Conditional Position Mapping: t = -1, h from H_V and w from W_V on, so no token shares a row, column or frame
    with the video.
    """
    rows = video_height + torch.arange(height, dtype=torch.float32)
    columns = video_width + torch.arange(width, dtype=torch.float32)
    h, w = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(h, -1.0), h, w], dim=-1).reshape(1, -1, 3)


class Host(Protocol):
    """What a prefill borrows from the program that the network lives in."""

    def cast(self, parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A bare parameter in the type and on the device of `like`."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[B, R, H, D] at the reference's rotary positions."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention, all [B, R, H, D]."""

    def check(self) -> None:
        """Called before every block; raises to stop."""


def prefill(
    network: Any, adapter: VideoAdapter, latent: torch.Tensor, dtype: torch.dtype, keep: frozenset[int], host: Host,
    recompute: bool = False,
) -> Rows:
    """K'_I and V_I, each [B, R, H, D] in `dtype`, of the blocks in `keep`.

    `network` is a Wan transformer by its own names. latent: [B, C, 1, h, w] in the model's space, h and w multiples
    of the patch. The image tokens are modulated at timestep 0, skip the cross-attention and pass the feed-forward
    (as the official code has it; the paper's section 3.2 words the second otherwise). With `recompute` a backward
    pass keeps what a block is given, and computes the block again.
    """
    x = network.patch_embedding(latent.float()).to(dtype).flatten(2).transpose(1, 2)
    half = network.freq_dim // 2
    # The sinusoids of timestep 0.
    signal = torch.cat([x.new_ones(1, half), x.new_zeros(1, half)], dim=1)
    time = network.time_projection(network.time_embedding(signal)).unflatten(-1, (6, -1))
    rows: Rows = {}
    last = max(keep)
    for i, (block, update) in enumerate(zip(network.blocks, adapter.blocks, strict=True)):
        host.check()
        given = block, update, x, time, i == last, host
        x, *pair = checkpoint(_through, *given, use_reentrant=False) if recompute else _through(*given)
        if i in keep:
            rows[i] = tuple(pair)
        if i == last:
            break
    return rows


def _through(
    block: Any, update: BlockUpdates, x: torch.Tensor, time: torch.Tensor, last: bool, host: Host
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What becomes of the image tokens x in a block, as they were in the `last` one, and its K'_I and V_I."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (host.cast(block.modulation, x) + time).chunk(6, dim=1)
    attention = block.self_attn
    heads = (attention.num_heads, -1)
    y = torch.addcmul(shift, block.norm1(x), 1 + scale)
    k = host.rotate(attention.norm_k(attention.k(y) + update.k(y)).unflatten(-1, heads))
    v = (attention.v(y) + update.v(y)).unflatten(-1, heads)
    if last:
        return x, k, v
    q = host.rotate(attention.norm_q(attention.q(y) + update.q(y)).unflatten(-1, heads))
    x = torch.addcmul(x, attention.o(host.attend(q, k, v).flatten(2)), gate)
    x = torch.addcmul(x, block.ffn(torch.addcmul(ffn_shift, block.norm2(x), 1 + ffn_scale)), ffn_gate)
    return x, k, v


def kept_blocks(config: VideoIdentityConfig, count: int) -> frozenset[int]:
    """The blocks in which the reference is seen. Raises ValueError where a model of `count` blocks lacks one."""
    chosen = parse_blocks(config.blocks)
    if chosen is None:
        return frozenset(range(count))
    if max(chosen) >= count:
        raise ValueError(f"blocks is {config.blocks!r} and this model has 0 to {count - 1}: choose among those")
    return chosen


def token_weights(mask: torch.Tensor, frames: int, height: int, width: int, patch: tuple[int, int]) -> torch.Tensor:
    """The mask's mean over each token's part of the video: [frames, rows, columns]; 0 and 1 stay exact.

    mask: [F, H, W] in 0..1; frames, height and width: of the whole video latent. F is 1 (for all frames), `frames`
    (one a latent frame) or 4 (frames - 1) + 1 (one a video frame: the first latent frame is the first frame, and
    each later one is the mean of the next four). Raises ValueError for another F.
    """
    count = mask.shape[0]
    cells = torch.nn.functional.adaptive_avg_pool2d(mask.float().unsqueeze(1), (height, width))
    # What the model pads, it pads beyond the edge: the cells there are worth what the edge is worth.
    padding = (0, -width % patch[1], 0, -height % patch[0])
    cells = torch.nn.functional.pad(cells, padding, mode="replicate")
    tokens = torch.nn.functional.avg_pool2d(cells, patch).squeeze(1)
    if count == 1:
        return tokens.expand(frames, -1, -1)
    if count == frames:
        return tokens
    if count == 4 * (frames - 1) + 1:
        return torch.cat([tokens[:1], tokens[1:].unflatten(0, (frames - 1, 4)).mean(1)])
    raise ValueError(
        f"mask has {count} frames and the video has {4 * (frames - 1) + 1} ({frames} in the latent): give one mask "
        "for all, or one a frame"
    )


class ReferenceCache:
    """What was computed for a running model and a reference; an entry stands there complete or not at all.

    Safe under threads: one fills while the others wait.
    """

    # Weights that change with the step make a version each: the two halves of CFG may have one of their own.
    VERSIONS = 2

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[tuple, tuple[weakref.ref, dict[tuple, Any]]] = {}

    def get(self, owner: Any, key: tuple, fill: Callable[[], Any], version: tuple = ()) -> Any:
        """The value of (owner, key) in this version, by `fill` where there is none.

        What `fill` raises leaves no entry. Of one key the newest VERSIONS are kept.
        """
        with self._lock:
            entry = self._entries.get((id(owner), *key))
            # An id alone could be that of a model which is gone.
            versions = entry[1] if entry is not None and entry[0]() is owner else {}
            if version not in versions:
                value = fill()
                while len(versions) >= self.VERSIONS:
                    del versions[next(iter(versions))]
                versions[version] = value
                self._entries[(id(owner), *key)] = (weakref.ref(owner), versions)
            return versions[version]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
