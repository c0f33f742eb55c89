"""Every kernel on this device beside the definition: the same function in fp64 on the CPU, of the same inputs.

Inputs are rounded to the type first, so that what differs is the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from comfy.ldm.modules.attention import optimized_attention
from pack.kernels import (
    channel_mask,
    fft_device,
    fusion_embedding,
    low_frequency_alignment,
    restricted_attention,
    spectral_guidance,
    token_attention,
    wavelet_detail,
)
from support import explicit_attention
from support.benchmark import Report, WrongResultError

FP32 = {torch.float32: 1e-5}
# A kernel that upcasts returns its own type.
BOTH = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Spectra of bins next to 0 have angles that rounding turns.
SPECTRAL = {torch.float32: 1e-3}

Inputs = Mapping[str, torch.Tensor]


def drawn(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """fp64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _spectral(change: Callable, distance: str, x, source, driving) -> torch.Tensor:
    return change(x, spectral_guidance.prepare(source, driving, distance=distance))


def _host_attention(q, k, v) -> torch.Tensor:
    return optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2]).unflatten(-1, q.shape[2:])


def _joint(q, k, v, k_i, v_i) -> torch.Tensor:
    if q.dtype == torch.float64:
        return explicit_attention.restricted(q, k, v, [restricted_attention.Reference(k_i, v_i)])
    return restricted_attention.joint(q, k, v, [restricted_attention.Reference(k_i, v_i)], _host_attention)


def _weighted(q, k, v, k_i, v_i) -> torch.Tensor:
    weight = torch.linspace(0, 2, q.shape[1], device=q.device, dtype=torch.float32)
    reference = restricted_attention.Reference(k_i, v_i, weight.to(q) if q.dtype == torch.float64 else weight)
    if q.dtype == torch.float64:
        return explicit_attention.restricted(q, k, v, [reference])
    return restricted_attention.weighted(q, k, v, [reference])


def _log_sum_exp(q, k, v, **_rest) -> torch.Tensor:
    return restricted_attention.attention_with_lse(q, k, v)[1]


def _columns(q, k) -> torch.Tensor:
    if q.dtype == torch.float64:  # by the definition, since the kernel computes in fp32
        scores = torch.einsum("bnhd,bmhd->bhnm", q.unflatten(-1, (4, -1)), k.unflatten(-1, (4, -1)))
        return (scores / (q.shape[-1] // 4) ** 0.5).softmax(-1)[..., [1, 5]].sum(-1).mean(1)
    return token_attention.token_attention(q, k, 4, [1, 5])


def _combine(source, pose, **weights) -> torch.Tensor:
    named = {f"{layer}.{kind}": weights[f"{layer}_{kind}"] / 8
             for layer in fusion_embedding.LAYERS for kind in ("weight", "bias")}
    return fusion_embedding.combine(source, pose, named)


def _contrast_gradient(source, target, fused) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = fused.clone().requires_grad_()
        loss = fusion_embedding.source_enhanced_info_nce(source, target, leaf, 0.1, 1.0)
        return torch.autograd.grad(loss, leaf)[0]


def _aligned(x, first, second) -> torch.Tensor:
    rounds = [low_frequency_alignment.statistics(low_frequency_alignment.low_pass(r, 0.2)) for r in (first, second)]
    return low_frequency_alignment.align(x, low_frequency_alignment.running_average(rounds, 0.5), 0.2, 1.0)


_LATENTS = {"x": (2, 4, 64, 63), "source": (1, 4, 64, 63), "driving": (1, 4, 64, 63)}
# Odd counts, at which kernels pad.
_ROWS = {name: (1, 651, 2, 128) for name in "qkv"}
_REFERENCE = {name: (1, 133, 2, 128) for name in ("k_i", "v_i")}
_WIDTHS = {"pose_projection": (64, 64), "source_projection": (64, 64), "gate_hidden": (64, 128), "gate": (1, 64),
           "mixing": (64, 128), "output": (64, 64)}
_COMBINER = {"source": (8, 64), "pose": (8, 64)} | {
    f"{layer}_{kind}": shape if kind == "weight" else shape[:1]
    for layer, shape in _WIDTHS.items() for kind in ("weight", "bias")
}
# What is checked: the function of inputs by name, their shapes, and the error that each type may have.
CASES: dict[str, tuple[Callable[..., torch.Tensor], dict[str, tuple[int, ...]], dict[torch.dtype, float]]] = {
    "spectral guidance, gradient": (partial(_spectral, spectral_guidance.gradient, "circular"), _LATENTS, SPECTRAL),
    "spectral guidance, per_bin": (
        partial(_spectral, lambda x, target: spectral_guidance.update(x, target, 0.3, 0.5), "circular"), _LATENTS,
        SPECTRAL,
    ),
    "spectral guidance, paper's phases": (
        partial(_spectral, lambda x, target: spectral_guidance.update(x, target, 0.3, 0.5), "paper"), _LATENTS,
        {torch.float32: 1e-2},  # an angle next to 0 has either sign
    ),
    "low frequency alignment": (_aligned, {name: (2, 4, 64, 63) for name in ("x", "first", "second")}, FP32),
    "wavelet detail": (
        lambda x, reference: wavelet_detail.inject(x, reference, 2),
        {"x": (2, 4, 30, 31), "reference": (1, 4, 30, 31)}, BOTH,
    ),
    "token attention": (
        _columns, {"q": (2, 1024, 256), "k": (2, 77, 256)}, {torch.float32: 1e-5, torch.bfloat16: 1e-5},
    ),
    "restricted attention, joint": (_joint, _ROWS | _REFERENCE, BOTH),
    "restricted attention, weighted": (_weighted, _ROWS | _REFERENCE, BOTH),
    "restricted attention, log-sum-exp": (_log_sum_exp, _ROWS, {torch.float32: 1e-5, torch.bfloat16: 1e-3}),
    "fusion embedding, combine": (_combine, _COMBINER, FP32),
    "fusion embedding, gradient of the contrast": (
        _contrast_gradient, {name: (8, 64) for name in ("source", "target", "fused")}, FP32,
    ),
}


def check_all(report: Report) -> None:
    """Every case in every type, then what is exact. Raises WrongResultError, naming all, at the end."""
    device, wrong = report.device, []
    if fft_device.fft_device(device).type != device.type:
        report.note(f"spectra are computed on the CPU: {device.type} has no complex FFT")
    with torch.inference_mode():
        for name, (function, shapes, limits) in CASES.items():
            inputs = drawn(**shapes)
            for dtype, limit in limits.items():
                rounded = {key: value.to(dtype) for key, value in inputs.items()}
                expected = function(**{key: value.double() for key, value in rounded.items()})
                out = function(**{key: value.to(device) for key, value in rounded.items()})
                try:
                    report.check(f"{name}, {str(dtype).removeprefix('torch.')}", out, expected, limit)
                except WrongResultError as error:
                    wrong.append(str(error))
        gradients = {key: value.float() for key, value in drawn(a=(8, 768), b=(8, 768), c=(8, 768)).items()}
        for merge in channel_mask.MERGES:
            on_cpu, here = (
                channel_mask.channel_mask(*(g.to(place) for g in gradients.values()), 0.5, merge).cpu()
                for place in ("cpu", device)
            )
            differing = int((on_cpu != here).sum())
            report.note(f"channel mask, {merge}: {differing} channels differ from the CPU's")
            if differing:
                wrong.append(f"channel mask, {merge}, differs")
    if wrong:
        raise WrongResultError("; ".join(wrong))
