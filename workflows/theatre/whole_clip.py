"""ComfyUI's Wan VAE as it is trained: a clip in one pass instead of frame pairs, on the same modules.

ComfyUI walks through a clip in pairs of frames with caches, which saves memory and costs a CPU several times the
time. Here every layer sees the whole clip at once; `tests/nodes/puppets/test_theatre_wan.py` compares the two.
"""

import comfy.ldm.wan.vae
import torch
from comfy.ldm.wan.vae import CausalConv3d, Resample, ResidualBlock, RMS_norm, WanVAE

CHANNELS = 16  # latent channels, as all Wan 2.1 models have
STRIDE = 8  # pixels a latent


def build(dim: int) -> WanVAE:
    """ComfyUI's class as its loader builds it from a file of this width, initialised for training.

    Every causal kernel begins as a picture's: its weights for past frames are zero. The outermost 1 × 1
    convolutions are the identity and stay so; `fold` writes the latents' scale into them.
    """
    vae = WanVAE(dim=dim, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                 temperal_downsample=[False, True, True])
    for layer in vae.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.zeros_(layer.weight)
            newest = layer.weight[:, :, -1:] if layer.weight.ndim == 5 else layer.weight
            fan_in = newest[0].numel()
            with torch.no_grad():
                newest.normal_(std=(2 / fan_in) ** 0.5)
            torch.nn.init.zeros_(layer.bias)
    for layer in vae.modules():
        if isinstance(layer, ResidualBlock):
            layer.residual[-1].weight.data.mul_(0.1)  # a block learns fastest when it starts near the identity
        elif isinstance(layer, comfy.ldm.wan.vae.AttentionBlock):
            torch.nn.init.zeros_(layer.proj.weight)
        elif isinstance(layer, Resample) and hasattr(layer, "time_conv"):
            _repeat(layer)
    vae.decoder.head[-1].weight.data.mul_(0.1)
    vae.encoder.head[-1].weight.data[CHANNELS:] = 0  # the published model's log-variance, which nobody reads
    fold(vae, torch.zeros(CHANNELS), torch.ones(CHANNELS))
    for layer in (vae.conv1, vae.conv2):
        layer.requires_grad_(False)
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv3d):  # 1.6 times as fast on a CPU, in this layout
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def _repeat(layer: Resample) -> None:
    """Time at first does nothing but average two frames, or show one twice."""
    weight = layer.time_conv.weight.data.zero_()
    size = weight.shape[1]
    eye = torch.eye(size)
    if layer.mode == "downsample3d":
        weight[:, :, 1, 0, 0] = weight[:, :, 2, 0, 0] = eye / 2
    else:
        weight[:size, :, 2, 0, 0] = weight[size:, :, 2, 0, 0] = eye


def fold(vae: WanVAE, shift: torch.Tensor, scale: torch.Tensor) -> None:
    """Set the outermost convolutions so that encode gives latents * scale + shift, and decode takes those.

    `shift` and `scale` [16] refer to the latents of a VAE that `build` made, as it was trained.
    """
    with torch.no_grad():
        for layer in (vae.conv1, vae.conv2):
            layer.weight.zero_()
            layer.bias.zero_()
        vae.conv1.weight[:CHANNELS, :CHANNELS, 0, 0, 0] = torch.diag(scale)
        vae.conv1.bias[:CHANNELS] = shift
        vae.conv2.weight[:, :, 0, 0, 0] = torch.diag(1 / scale)
        vae.conv2.bias.copy_(-shift / scale)


def encode(vae: WanVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, 1 + T/4, H/8, W/8] of pixels [B, 3, 1 + T, H, W] in [-1, 1]; T is a multiple of 4."""
    return vae.conv1(_through(vae.encoder, pixels))[:, :CHANNELS]


def decode(vae: WanVAE, latents: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, 1 + T, H, W] of latents [B, 16, 1 + T/4, H/8, W/8]."""
    return _through(vae.decoder, vae.conv2(latents))


def _through(half: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    blocks = half.downsamples if hasattr(half, "downsamples") else None
    inner = (*half.middle, *half.upsamples) if blocks is None else (*blocks, *half.middle)
    for layer in (half.conv1, *inner, *half.head):
        x = _forward(layer, x)
    return x


def _forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, Resample):
        return _resample(layer, x)
    if isinstance(layer, RMS_norm):
        return _normalised(layer, x)
    if isinstance(layer, ResidualBlock):
        inner = x
        for part in layer.residual:
            inner = _forward(part, inner)
        return inner + layer.shortcut(x)
    return layer(x)


def _normalised(layer: RMS_norm, x: torch.Tensor) -> torch.Tensor:
    """`RMS_norm` with one reciprocal a pixel: on a CPU a training step takes four fifths of the time."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * (layer.scale / length.clamp_min(1e-12)).to(x.dtype) * layer.gamma.to(x)


def _resample(layer: Resample, x: torch.Tensor) -> torch.Tensor:
    """`Resample` without caches: the first frame stands alone, the others pass the convolution in time."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    if layer.mode == "upsample3d" and rest.shape[2]:
        pairs = layer.time_conv(rest).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
        x = torch.cat([first, torch.stack([pairs[:, 0], pairs[:, 1]], 3).flatten(2, 3)], 2)
    batch, frames = x.shape[0], x.shape[2]
    flat = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = layer.resample(flat).unflatten(0, (batch, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], _strided(layer.time_conv, x)], 2)
    return x.contiguous(memory_format=torch.channels_last_3d)


def _strided(convolution: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """Without `CausalConv3d`'s path for one frame, which pads: here every window is whole."""
    return torch.nn.functional.conv3d(x, convolution.weight, convolution.bias, stride=convolution.stride)
