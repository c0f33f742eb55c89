"""Where a spectrum is computed: on the device of the tensor, or on the CPU if that has no complex FFT."""

import functools

import torch

# Device types whose PyTorch backend is known to have the complex FFT; every other one is probed once.
_FFT_DEVICE_TYPES = frozenset(("cpu", "cuda"))


def fft_device(device: torch.device | str) -> torch.device:
    """`device` where it has real FFTs and complex arithmetic, else the CPU."""
    device = torch.device(device)
    if device.type in _FFT_DEVICE_TYPES or _has_complex_fft(device):
        return device
    return torch.device("cpu")


@functools.cache
def _has_complex_fft(device: torch.device) -> bool:
    try:
        spectrum = torch.fft.rfft2(torch.ones(1, 2, 3, device=device), norm="ortho")
        rotated = spectrum * torch.polar(spectrum.abs(), spectrum.angle()).conj()
        torch.fft.irfft2(rotated, s=(2, 3), norm="ortho").cpu()
    except (RuntimeError, TypeError):  # what backends raise for a missing operation
        return False
    return True
