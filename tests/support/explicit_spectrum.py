"""The losses of frequency guidance written out over every bin of a DFT by matrices, as the kernel's reference."""

import math

import torch
from pack.kernels.spectral_guidance import ALL_BANDS


def dft(count):
    """The orthonormal DFT as a matrix, from its definition."""
    index = torch.arange(count, dtype=torch.float64)
    angle = -2 * math.pi * index[:, None] * index[None, :] / count
    return torch.complex(angle.cos(), angle.sin()) / math.sqrt(count)


def spectrum(x):
    return dft(x.shape[-2]) @ x.to(torch.complex128) @ dft(x.shape[-1])


def signed(k, count):
    return (k if k <= count // 2 else k - count) / count


def in_band(height, width, band):
    mask = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            frequency = round(math.hypot(signed(i, height), signed(j, width)), 9)
            mask[i, j] = round(band.low, 9) <= frequency <= round(band.high, 9)
    return mask


def self_conjugate(height, width):
    mask = torch.zeros(height, width, dtype=torch.bool)
    for i in {0, height / 2}:
        for j in {0, width / 2}:
            if i == int(i) and j == int(j):
                mask[int(i), int(j)] = True
    return mask


def reference_losses(x, s, d, distance, amplitude_band=ALL_BANDS, phase_band=ALL_BANDS):
    """The formulas over all H x W bins, differentiable; a real bin's angle is 0 or pi, or is left out."""
    X, S, D = spectrum(x), spectrum(s), spectrum(d)
    size = x.shape[-2:]
    amplitude = 0.5 * ((X.abs() - S.abs()) ** 2 * in_band(*size, amplitude_band)).sum((-2, -1))
    real = self_conjugate(*size)
    theta = torch.atan2(torch.where(real, 0, X.imag), X.real)
    phi = torch.atan2(torch.where(real, 0, D.imag), D.real)
    if distance == "circular":
        phase = X.abs() * (1 - torch.cos(theta - phi))
    else:
        phase = 0.5 * (theta.abs() - phi.abs()) ** 2 * ~real
    return amplitude, (phase * in_band(*size, phase_band)).sum((-2, -1))


def reference_gradient(x, *rest):
    x = x.clone().requires_grad_()
    amplitude, phase = reference_losses(x, *rest)
    return (
        torch.autograd.grad(amplitude.sum(), x, retain_graph=True)[0],
        torch.autograd.grad(phase.sum(), x)[0],
    )
