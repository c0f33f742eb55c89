"""A reference's finest wavelet bands in a latent, where the two agree in what is coarser.

Source: the idea of FreqEdit (arXiv 2512.01755, read as an abstract): inject the high bands of a reference's velocity
early, less where the edit acts. Ours: on the denoised estimate, whose reference is the picture itself; Haar's bands;
and the weight below, which needs no threshold.

Notation. x and r (reference) are [..., C, H, W]. The n finest bands of Haar's transform are x less the mean of its
blocks of 2^n x 2^n. With the means X and R, a block's weight is

    w = max(0, 1 - |X - R| / s),    s = the standard deviation of R over its blocks

where |.| and the deviation are root mean squares over channels: 1 where an edit leaves the coarse picture alone, 0
where it changes it by as much as the picture itself changes from place to place.
"""

import torch
import torch.nn.functional as F


def inject(x: torch.Tensor, reference: torch.Tensor, bands: int) -> torch.Tensor:
    """x [..., C, H, W] with the `bands` finest Haar bands of `reference`, which broadcasts to it, weighted by blocks.

    0 bands return x itself. Computed in fp32 (fp64 for fp64); x's dtype.
    """
    if bands == 0:
        return x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    ours, other = x.to(dtype), reference.to(x.device, dtype).expand(x.shape)
    coarse, coarse_reference = (_block_means(part, bands) for part in (ours, other))
    weight = _enlarged(agreement(coarse, coarse_reference), bands, x.shape)
    details = [part - _enlarged(means, bands, x.shape) for part, means in ((ours, coarse), (other, coarse_reference))]
    return (ours + weight * (details[1] - details[0])).to(x.dtype)


def agreement(coarse: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The weight w [..., 1, h, w] of each block of two coarse pictures [..., C, h, w]."""
    distance = (coarse - reference).square().mean(-3, keepdim=True).sqrt()
    spread = (reference - reference.mean((-2, -1), keepdim=True)).square().mean((-3, -2, -1), keepdim=True).sqrt()
    return (1 - distance / spread.clamp(min=torch.finfo(spread.dtype).tiny)).clamp(min=0)


def _block_means(x: torch.Tensor, bands: int) -> torch.Tensor:
    flat = x.reshape(-1, 1, *x.shape[-2:])
    # Blocks at the far edges are smaller where the side is no multiple of theirs.
    means = F.avg_pool2d(flat, 2**bands, ceil_mode=True, count_include_pad=False)
    return means.reshape(*x.shape[:-2], *means.shape[-2:])


def _enlarged(means: torch.Tensor, bands: int, shape: torch.Size) -> torch.Tensor:
    blocks = means.repeat_interleave(2**bands, -2).repeat_interleave(2**bands, -1)
    return blocks[..., : shape[-2], : shape[-1]]
