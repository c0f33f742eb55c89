"""Which device computes a spectrum, and how that is probed."""

import pytest
import torch
from pack.kernels import fft_device


def test_known_devices_are_not_probed(monkeypatch):
    def refuse(device):
        raise AssertionError("probed")

    monkeypatch.setattr(fft_device, "_has_complex_fft", refuse)
    for device in ("cpu", "cuda:1"):
        assert fft_device.fft_device(device) == torch.device(device)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, None])
def test_other_devices_are_probed_once(monkeypatch, error):
    calls = []

    def rfft2(x, norm):
        calls.append(x.device)
        if error is not None:
            raise error("no complex here")
        return torch.ones(1, 2, 2, dtype=torch.complex64)

    monkeypatch.setattr(fft_device.torch.fft, "rfft2", rfft2)
    fft_device._has_complex_fft.cache_clear()
    device = torch.device("meta")
    expected = torch.device("cpu") if error else device
    assert [fft_device.fft_device(device) for _ in range(3)] == [expected] * 3
    assert len(calls) == 1
    fft_device._has_complex_fft.cache_clear()
