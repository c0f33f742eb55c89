"""Which backend runs, why, and what is probed."""

import pytest
import torch
from pack.kernels import dispatch


def test_eager_with_its_reason_while_nothing_is_measured():
    choice = dispatch.choose("spectral_guidance", "cpu")
    assert choice.backend == "eager" and "no Triton kernel" in choice.reason
    line = dispatch.explain("spectral_guidance", torch.device("cpu"))
    assert line == f"spectral_guidance on cpu: eager ({choice.reason})"


def test_triton_needs_its_kernel_the_device_and_the_package(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_OPS", frozenset(("restricted_attention",)))
    assert "cpu" in dispatch.choose("restricted_attention", "cpu").reason
    for installed, backend in ((None, "eager"), (object(), "triton")):
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name, found=installed: found)
        assert dispatch.choose("restricted_attention", "cuda").backend == backend
        assert dispatch.choose("spectral_guidance", "cuda").backend == "eager"


def test_known_devices_are_not_probed(monkeypatch):
    def refuse(device):
        raise AssertionError("probed")

    monkeypatch.setattr(dispatch, "_has_complex_fft", refuse)
    for device in ("cpu", "cuda:1"):
        assert dispatch.fft_device(device) == torch.device(device)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, None])
def test_other_devices_are_probed_once(monkeypatch, error):
    calls = []

    def rfft2(x, norm):
        calls.append(x.device)
        if error is not None:
            raise error("no complex here")
        return torch.ones(1, 2, 2, dtype=torch.complex64)

    monkeypatch.setattr(dispatch.torch.fft, "rfft2", rfft2)
    dispatch._has_complex_fft.cache_clear()
    device = torch.device("meta")
    expected = torch.device("cpu") if error else device
    assert [dispatch.fft_device(device) for _ in range(3)] == [expected] * 3
    assert len(calls) == 1
    dispatch._has_complex_fft.cache_clear()
