"""Amplitude and phase losses on the 2-D spectrum of latents, their analytic gradient, and guidance updates.

Source: ImPoster (arXiv 2409.15650), whose sampling step is z <- z - s_a grad G_a - s_p grad G_p.

Notation. Latents x, s (source) and d (driving) are real, [..., H, W]; the transform runs over the last two
axes, so [B, C, H, W] is taken per channel and [B, C, T, H, W] per channel and frame. X, S, D are orthonormal
spectra: by Parseval, a step in the spectrum is as long as the step in the latent, at every resolution.

    G_a          = 1/2 sum_k (|X_k| - |S_k|)^2
    G_p circular = sum_k |X_k| (1 - cos(arg X_k - arg D_k))            ours: amplitude-weighted and smooth
    G_p paper    = 1/2 sum_k (|arg X_k| - |arg D_k|)^2                 as published, up to its constant

Sums run over the whole plane, so a loss has one value per plane, shape x.shape[:-2]. `circular` is convex in
x. `paper` cannot tell an angle from its negative, hence a picture from its 180 degree rotation; it leaves out
the bins that are real in every real plane (angle 0 or pi), where it is constant and cannot be descended.

Scales. They have no unit; 1.0 means "all the way" at every resolution and for every model:
- `per_bin` moves every bin by the fraction s of its distance: |X| linearly to |S|, and the angle along the arc to
  the driving angle (for `paper`, |angle| to |angle| with the sign of the bin). For |X| that is the plain
  gradient step. For `circular` it is the gradient step preconditioned by |X| per bin, taken along the arc
  instead of its chord so that amplitudes stay; s = 1 is a minimiser of either.
- `gradient` is plain descent, x - s_a t_a grad G_a - s_p t_p grad G_p, with t = 2 G / |grad G|^2 per plane:
  the step at which a quadratic loss with minimum 0 reaches its minimum. For G_a, t is exactly 1.

Published scales. The official losses are means of squares over B x C x H x W bins of an unnormalised
transform, which makes them 2/(B C) G_a and 2/(B C H W) G_p. Plain descent with the published rate r_a is
s_a = 2 r_a/(B C) here, and with r_p it is s_p = 2 r_p/(B C H W t_p) under `gradient`. The shipped r_a = 1e-6
on four channels is s_a = 5e-7: invisible.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .fft_device import fft_device

DISTANCES = ("circular", "paper")
RULES = ("per_bin", "gradient")
_CUTOFF_ROUNDING = 1e-9
# The highest frequency of a plane is sqrt(1/2) cycles per pixel: a cutoff from here on lets everything pass.
HIGHEST_CUTOFF = 0.75


class Band(NamedTuple):
    """Spatial frequencies, in cycles per latent pixel, both ends included. The highest one is sqrt(1/2)."""

    low: float = 0.0
    high: float = math.inf


ALL_BANDS = Band()


@dataclass(frozen=True)
class Target:
    """What an estimate is moved towards; `prepare` makes it once per sampling run. Spectra are [..., H, W//2 + 1].

    `amplitude` is |S|; `phasor` is D/|D|, and 0 where the driving phase is undefined or outside its band.
    """

    size: tuple[int, int]
    amplitude: torch.Tensor | None
    amplitude_band: torch.Tensor | None
    phasor: torch.Tensor | None
    distance: str


class Losses(NamedTuple):
    """G_a and G_p, one value per plane, shape x.shape[:-2]; 0 for a term without a target."""

    amplitude: torch.Tensor
    phase: torch.Tensor


def prepare(
    source: torch.Tensor | None, driving: torch.Tensor | None, *, distance: str = "circular",
    amplitude_band: Band = ALL_BANDS, phase_band: Band = ALL_BANDS,
) -> Target:
    """Spectra of the source and the driving latent, [..., H, W]; None switches a term off.

    Both stay on their device, or on the CPU where that device lacks the complex FFT.
    Raises ValueError for different sizes, no latent, an unknown distance, or a band without a bin.
    """
    if distance not in DISTANCES:
        raise ValueError(f"phase distance {distance!r} is unknown: use one of {', '.join(DISTANCES)}")
    sizes = {tuple(latent.shape[-2:]) for latent in (source, driving) if latent is not None}
    if len(sizes) != 1:
        raise ValueError(f"source and driving latent need one common size, not {sorted(sizes)}: encode both at it")
    (size,) = sizes
    amplitude = mask = phasor = None
    if source is not None:
        amplitude = half_spectrum(source).abs()
        mask = band_mask(size, amplitude_band, amplitude.device)
    if driving is not None:
        phasor = driving_phasor(driving, distance, phase_band)
    return Target(size, amplitude, mask, phasor, distance)


def driving_phasor(driving: torch.Tensor, distance: str = "circular", phase_band: Band = ALL_BANDS) -> torch.Tensor:
    """D/|D| of a driving latent [..., H, W], [..., H, W//2 + 1]; 0 where a phase is undefined or out of the band."""
    size = tuple(driving.shape[-2:])
    spectrum = half_spectrum(driving)
    band = band_mask(size, phase_band, spectrum.device)
    if distance == "paper":
        band &= ~_real_bins(size, band.device)
    length = spectrum.abs()
    return torch.where(band & (length > _floor(length)), spectrum / length, 0)


def band_mask(size: tuple[int, int], band: Band, device: torch.device | str = "cpu") -> torch.Tensor:
    """The bins of a band in the half spectrum of an H x W plane: bool, [H, W//2 + 1]."""
    height, width = size
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)[None, :]
    frequency = torch.sqrt(rows**2 + columns**2)
    # A cutoff such as 0.3 includes the bin 3/10, however either is rounded.
    mask = (frequency >= band.low - _CUTOFF_ROUNDING) & (frequency <= band.high + _CUTOFF_ROUNDING)
    if not mask.any():
        raise ValueError(
            f"no frequency of a {height} x {width} latent lies in {band.low}..{band.high} cycles per pixel: "
            "lower the low cutoff or raise the high one"
        )
    return mask.to(device)


def losses(x: torch.Tensor, target: Target) -> Losses:
    """G_a and G_p of x [..., H, W], fp32 (fp64 for fp64)."""
    spectrum = half_spectrum(_checked(x, target))
    length = spectrum.abs()
    zero = length.new_zeros(length.shape[:-2])
    amplitude = phase = zero
    if target.amplitude is not None:
        error = (length - target.amplitude) * target.amplitude_band
        amplitude = 0.5 * _plane_sum(error.square(), target.size)
    if target.phasor is not None:
        phase = _phase_loss(spectrum, length, target)
    return Losses(amplitude.to(x.device), phase.to(x.device))


def gradient(
    x: torch.Tensor, target: Target, amplitude_weight: float = 1.0, phase_weight: float = 1.0
) -> torch.Tensor:
    """amplitude_weight grad G_a + phase_weight grad G_p at x [..., H, W]; x's shape and dtype.

    Both terms share one transform and one inverse. Bins without a phase (zero amplitude) get no gradient.
    """
    spectrum = half_spectrum(_checked(x, target))
    length = spectrum.abs()
    total = torch.zeros_like(spectrum)
    if target.amplitude is not None and amplitude_weight != 0:
        total += amplitude_weight * _amplitude_slope(spectrum, length, target)
    if target.phasor is not None and phase_weight != 0:
        total += phase_weight * _phase_slope(spectrum, length, target)
    return _latent(total, x)


def update(
    x: torch.Tensor, target: Target, amplitude_scale: float, phase_scale: float, rule: str = "per_bin"
) -> torch.Tensor:
    """x [..., H, W] moved towards the target by scales in 0..1 (see the module's text); x's shape and dtype.

    Scales of 0 return x itself, bit for bit.
    """
    if rule not in RULES:
        raise ValueError(f"update rule {rule!r} is unknown: use one of {', '.join(RULES)}")
    move_amplitude = target.amplitude is not None and amplitude_scale != 0
    move_phase = target.phasor is not None and phase_scale != 0
    if not (move_amplitude or move_phase):
        return x
    spectrum = half_spectrum(_checked(x, target))
    length = spectrum.abs()
    if rule == "gradient":
        step = torch.zeros_like(spectrum)
        if move_amplitude:
            step += amplitude_scale * _amplitude_slope(spectrum, length, target)
        if move_phase:
            slope = _symmetric(_phase_slope(spectrum, length, target), target.size)
            square = _plane_sum(slope.real.square() + slope.imag.square(), target.size)
            rate = torch.where(square > 0, 2 * _phase_loss(spectrum, length, target) / square, 0)
            step += phase_scale * rate[..., None, None] * slope
        return _latent(spectrum - step, x)
    factor = torch.ones_like(length)
    angle = torch.zeros_like(length)
    if move_amplitude:
        moved = length + amplitude_scale * (target.amplitude_band * (target.amplitude - length))
        factor = torch.where(length > _floor(length), moved / length, 1)
    if move_phase:
        angle = phase_scale * _phase_error(spectrum, target)
    return _latent(spectrum * torch.polar(factor, angle), x)


def _amplitude_slope(spectrum: torch.Tensor, length: torch.Tensor, target: Target) -> torch.Tensor:
    slope = (1 - target.amplitude / length) * target.amplitude_band
    return torch.where(length > _floor(length), spectrum * slope, 0)


def _phase_slope(spectrum: torch.Tensor, length: torch.Tensor, target: Target) -> torch.Tensor:
    defined = (target.phasor != 0) & (length > _floor(length))
    if target.distance == "circular":
        return torch.where(defined, spectrum / length - target.phasor, 0)
    # d(arg X) = Im(conj(X) dX) / |X|^2, so the gradient of the angle is i X / |X|^2.
    return torch.where(defined, -1j * _phase_error(spectrum, target) * spectrum / length.square(), 0)


def _phase_loss(spectrum: torch.Tensor, length: torch.Tensor, target: Target) -> torch.Tensor:
    if target.distance == "circular":
        # |X - |X| P|^2 / (2 |X|) is |X| (1 - cos) without its cancellation near agreement.
        chord = spectrum - length * target.phasor
        square = chord.real.square() + chord.imag.square()
        defined = (target.phasor != 0) & (length > 0)
        return _plane_sum(torch.where(defined, square / (2 * length), 0), target.size)
    error = torch.where(length > _floor(length), _phase_error(spectrum, target), 0)
    return 0.5 * _plane_sum(error.square(), target.size)


def _phase_error(spectrum: torch.Tensor, target: Target) -> torch.Tensor:
    """The angle, in radians, by which each bin has to turn; 0 where the driving phase is undefined."""
    if target.distance == "circular":
        return torch.where(target.phasor != 0, (target.phasor * spectrum.conj()).angle(), 0)
    angle = spectrum.angle()
    error = target.phasor.angle().abs() - angle.abs()
    return torch.where(target.phasor != 0, torch.where(angle < 0, -error, error), 0)


def half_spectrum(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal spectrum [..., H, W//2 + 1] of x [..., H, W], on its device or on the CPU (fft_device)."""
    # complex half precision is missing or inexact on most backends: upcast, compute, cast back once.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.fft.rfft2(x.to(fft_device(x.device), dtype), norm="ortho")


def _latent(spectrum: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    size = tuple(like.shape[-2:])
    return torch.fft.irfft2(_symmetric(spectrum, size), s=size, norm="ortho").to(like)


def _symmetric(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Project to spectra of real planes, in place: columns 0 and W/2 hold each bin and its mirror image.

    A self-conjugate bin keeps its real part, so a phase turned part of the way there shrinks toward the flip.
    Inverse transforms differ by backend in what they do with the rest, hence the explicit projection.
    """
    width = size[1]
    mirrored = spectrum[..., :: width // 2] if width % 2 == 0 else spectrum[..., :1]
    mirrored.copy_(0.5 * (mirrored + mirrored.flip(-2).roll(1, -2).conj()))
    return spectrum


def _real_bins(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The bins that are their own mirror image: bool, [H, W//2 + 1]."""
    rows, columns = (torch.tensor([2 * k % n == 0 for k in range(n)], device=device) for n in size)
    return rows[:, None] & columns[None, : size[1] // 2 + 1]


def _plane_sum(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The sum over the whole spectrum from its half: columns 0 and W/2 count once, the others twice."""
    width = size[1]
    total = 2 * values.sum((-2, -1)) - values[..., 0].sum(-1)
    return total - values[..., width // 2].sum(-1) if width % 2 == 0 else total


def _floor(length: torch.Tensor) -> torch.Tensor:
    """Amplitudes up to this are rounding errors of the transform, and their phase is noise; [..., 1, 1]."""
    return 4 * torch.finfo(length.dtype).eps * length.amax((-2, -1), keepdim=True)


def _checked(x: torch.Tensor, target: Target) -> torch.Tensor:
    if tuple(x.shape[-2:]) != target.size:
        size = tuple(x.shape[-2:])
        raise ValueError(f"the target was prepared for latents of {target.size}, not {size}: prepare one for those")
    return x
