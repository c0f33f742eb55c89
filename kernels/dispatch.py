"""Which backend runs an operation on a device, and why: `eager` is the definition, `triton` must match it."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch

# The operations with a file in kernels/triton/. One enters only with a measured win on a GPU.
TRITON_OPS: frozenset[str] = frozenset()

# Device types whose PyTorch backend is known to have the complex FFT; every other one is probed once.
_FFT_DEVICE_TYPES = frozenset(("cpu", "cuda"))


class Choice(NamedTuple):
    """A backend, `eager` or `triton`, and the reason for it in words."""

    backend: str
    reason: str


def choose(op: str, device: torch.device | str) -> Choice:
    """The backend for `op` (a stem of a kernels file, such as `spectral_guidance`) on `device`."""
    device = torch.device(device)
    if op not in TRITON_OPS:
        return Choice("eager", f"{op} has no Triton kernel, since none was measured to be faster")
    if device.type != "cuda":
        return Choice("eager", f"Triton kernels need a CUDA or ROCm device, and this is {device.type}")
    if importlib.util.find_spec("triton") is None:
        return Choice("eager", "the package triton is not installed: pip install triton")
    return Choice("triton", f"{op} has a Triton kernel that was measured to be faster")


def explain(op: str, device: torch.device | str) -> str:
    """One line for a log or a report, such as `spectral_guidance on cpu: eager (... )`."""
    choice = choose(op, device)
    return f"{op} on {torch.device(device)}: {choice.backend} ({choice.reason})"


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
        turned = spectrum * torch.polar(spectrum.abs(), spectrum.angle()).conj()
        torch.fft.irfft2(turned, s=(2, 3), norm="ortho").cpu()
    except (RuntimeError, TypeError):  # what backends raise for a missing operation
        return False
    return True
