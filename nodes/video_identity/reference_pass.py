"""The pass of reference pictures through a Wan transformer; apart, since sampling and training both run it.

Source: Stand-In (arXiv 2508.07901). A reference sees neither the text nor the video nor its noise level, so one pass
serves every step and both halves of CFG. Its tokens are modulated at timestep 0, skip the cross-attention and go
through the feed-forward (as in the official code; the paper's section 3.2 words the second otherwise).
"""

from collections.abc import Mapping
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from torch.utils.checkpoint import checkpoint

from ..patching.wan_blocks import OVERRIDE
from . import method

# K'_I and V_I by block number, each [B, R, H, D]: batch, tokens of the reference, heads, head width.
ReferenceKV = dict[int, tuple[torch.Tensor, torch.Tensor]]


def reference_kv(
    base: Any, adapter: method.VideoAdapter, latent: torch.Tensor, *, blocks: frozenset[int],
    video_size: tuple[int, int], options: Mapping[str, Any], recompute: bool = False,
) -> ReferenceKV:
    """Keys and values of references in `blocks`, in the type that the model computes in.

    base: ComfyUI's model around the transformer; latent: [B, C, 1, h, w] in its space; video_size: height and width
    of the video in tokens. Of `options`, the call's transformer_options, the user's attention and scaled rotary
    positions count. With `recompute` a backward pass keeps what enters a block, and computes the block again.
    Raises ComfyUI's interruption before any block.
    """
    network = base.diffusion_model
    latent = _as_input(network, latent)
    rotation = _rotation(network, latent, video_size, options.get("rope_options") or {})
    attention_options = {OVERRIDE: options[OVERRIDE]} if options.get(OVERRIDE) else {}
    x = network.patch_embedding(latent.float()).to(base.get_dtype_inference()).flatten(2).transpose(1, 2)
    modulation = _modulation_at_zero(network, x)
    kv: ReferenceKV = {}
    last = max(blocks)
    for i, (block, update) in enumerate(zip(network.blocks, adapter.blocks, strict=True)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        inputs = block, update, x, modulation, rotation, attention_options, i == last
        x, k, v = checkpoint(_block_forward, *inputs, use_reentrant=False) if recompute else _block_forward(*inputs)
        if i in blocks:
            kv[i] = k, v
        if i == last:
            break
    return kv


def token_grid(network: Any, x: torch.Tensor) -> tuple[int, int]:
    """Height and width in tokens of a frame of x [B, C, T, H, W], after the model's padding."""
    if x.ndim != 5:
        raise ValueError(
            f"the video identity adapter needs latents [B, C, T, H, W], and this model's are {tuple(x.shape)}: use a "
            "Wan video model"
        )
    return -(-x.shape[-2] // network.patch_size[1]), -(-x.shape[-1] // network.patch_size[2])


def _block_forward(
    block: Any, update: method.BlockUpdates, x: torch.Tensor, modulation: torch.Tensor, rotation: torch.Tensor,
    attention_options: dict[str, Any], last: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference's tokens after a Wan block, and its K'_I and V_I; nothing reads the tokens after the `last`."""
    weight = comfy.model_management.cast_to(block.modulation, dtype=x.dtype, device=x.device)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (weight + modulation).chunk(6, dim=1)
    attention = block.self_attn
    heads = (attention.num_heads, -1)
    y = torch.addcmul(shift, block.norm1(x), 1 + scale)
    k = apply_rope1(attention.norm_k(attention.k(y) + update.k(y)).unflatten(-1, heads), rotation)
    v = (attention.v(y) + update.v(y)).unflatten(-1, heads)
    if last:
        return x, k, v
    q = apply_rope1(attention.norm_q(attention.q(y) + update.q(y)).unflatten(-1, heads), rotation)
    out = optimized_attention(
        q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2], transformer_options=attention_options
    )
    x = torch.addcmul(x, attention.o(out), gate)
    x = torch.addcmul(x, block.ffn(torch.addcmul(ffn_shift, block.norm2(x), 1 + ffn_scale)), ffn_gate)
    return x, k, v


def _as_input(network: Any, latent: torch.Tensor) -> torch.Tensor:
    """The latent with the channels that the model reads, padded to whole patches."""
    missing = network.patch_embedding.weight.shape[1] - latent.shape[1]
    if missing > 0:
        # Ours: image-to-video models read a mask and a picture beside the latent; a reference has neither.
        latent = torch.nn.functional.pad(latent, (0, 0, 0, 0, 0, 0, 0, missing))
    return comfy.ldm.common_dit.pad_to_patch_size(latent, network.patch_size)


def _rotation(
    network: Any, latent: torch.Tensor, video_size: tuple[int, int], rope: Mapping[str, float]
) -> torch.Tensor:
    """Rotary embedding of the reference's tokens beside the video, whose positions `rope` may stretch and shift."""
    video_end = [(n - 1) * rope.get(f"scale_{axis}", 1.0) + 1 for n, axis in zip(video_size, "yx", strict=True)]
    positions = method.reference_positions(*token_grid(network, latent), *video_end)
    # ComfyUI adds these to the video's positions; what counts is how far the reference is from it.
    positions += torch.tensor([rope.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    return network.rope_embedder(positions.to(latent.device)).movedim(1, 2)


def _modulation_at_zero(network: Any, x: torch.Tensor) -> torch.Tensor:
    """[1, 6, C]: what the model adds to its blocks' modulation at timestep 0, whose sinusoids are ones and zeros."""
    half = network.freq_dim // 2
    signal = torch.cat([x.new_ones(1, half), x.new_zeros(1, half)], dim=1)
    return network.time_projection(network.time_embedding(signal)).unflatten(-1, (6, -1))
