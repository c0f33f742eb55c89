"""Restricted self-attention: a Wan step with and without a reference, and our attention compared with other forms.

The shapes of Wan 14B on a GPU (832 x 480 and 1280 x 720, 81 frames; a reference of 512 x 512), else a small one.
Before anything is timed, every output is checked against the fp32 definition; at the end the counts by formula
against PyTorch's own count.

The attention alone: `ours`, the K/V buffer and ComfyUI's attention; `concatenation`, as in the official code, with
the same attention; `mask`, one joint attention of video and reference under an additive mask; `flex`, the same
with a block mask, compiled, on a GPU only. The last two get their joint rows prepared, which favours them. Without a
copy of K and V: `in place` has the joint rows prepared, as if the projections had written them there, so it is the
best that writing in place can give; `merged` are two segments, merged by their log-sum-exp, on PyTorch's kernels,
which ComfyUI's attention on the CPU does not run; `fused` is the same with the merge compiled.

A step runs through the nodes' own code; on a GPU, on a network of a few random blocks of the model's true width:
without a reference, with its rows from the cache, and with the reference's branch in every step.

    R1  cached / plain                 R2  ours / concatenation          R3  ours / mask, ours / flex
    R4  (prefill + CALLS cached steps) / (CALLS steps with the branch in each)
    R5  extra peak memory / (cache + adapter), on a GPU; by arithmetic elsewhere

An R1 below its count of FLOPs means that the measurement is wrong. That of the other two forms is that of ours with
the difference of the attentions, since the rest of the step is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import comfy.patcher_extension
import torch
from benchmarks.restricted_attention_counts import (
    CALLS,
    LARGE,
    SMALL,
    Shape,
    adapter_bytes,
    arithmetic,
    cache_bytes,
    extra_peak_bytes,
    prefill_flops,
    step_flops,
)
from comfy.ldm.modules.attention import optimized_attention
from pack.kernels import restricted_attention as ra
from pack.nodes.video_identity import method, reference_pass, sampling
from pack.nodes.video_identity.config import VideoIdentityConfig
from support import explicit_attention, tiny_model
from support.benchmark import Report, WrongResultError, interleaved, quotients
from support.random_models import RandomModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Relative error of a whole output; leaving out a reference makes 0.1 or more.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Blocks of the network whose steps are timed.
LAYERS = 2
# QUALITY's aims, by shape.
AIMS = {"14B, 480p": "≤ 1.022", "14B, 720p": "≤ 1.013"}
MEMORY_AIM = {"14B, 480p": "≤ 1.2"}


def host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None) -> torch.Tensor:
    """The user's own attention on [B, T, H, D]."""
    out = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2], mask=mask)
    return out.unflatten(-1, q.shape[2:])


def concatenation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reference: ra.Reference) -> torch.Tensor:
    keys, values = (torch.cat(pair, dim=1) for pair in ((k, reference.k), (v, reference.v)))
    return host_attention(q, keys, values)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int) -> Callable[[], torch.Tensor]:
    """The joint attention [video; reference] with a block mask, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(_batch, _head, query, key):
        return (query < n) | (key >= n)

    mask = create_block_mask(allowed, None, None, q.shape[1], q.shape[1], device=q.device, _compile=True)
    attention = torch.compile(flex_attention, dynamic=False)
    rows = [tensor.transpose(1, 2).contiguous() for tensor in (q, k, v)]
    return lambda: attention(*rows, block_mask=mask).transpose(1, 2)


def defined_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, references, attention=None, count: int = 128
) -> torch.Tensor:
    """The definition, `count` queries at a time, in place of `joint`."""
    return torch.cat([explicit_attention.restricted(rows, k, v, references) for rows in q.split(count, dim=1)], dim=1)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reference: ra.Reference) -> Callable[[], torch.Tensor]:
    """Two segments and a compiled merge, which reads both results once and writes one."""

    def merge(out, lse, other, other_lse):
        gate = torch.sigmoid(other_lse - lse)[..., None]
        return torch.lerp(out.to(gate.dtype), other.to(gate.dtype), gate).to(out.dtype)

    compiled = torch.compile(merge, dynamic=False)
    return lambda: compiled(*ra.attention_with_lse(q, k, v), *ra.attention_with_lse(q, reference.k, reference.v))


class Attentions:
    """The forms of the attention alone, on random rows."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        self.shape = shape
        n, heads = shape.n, shape.heads
        generator = torch.Generator(device).manual_seed(0)
        self.joint = [
            torch.randn(1, n + shape.r, heads, 128, generator=generator, device=device).to(dtype) for _ in range(3)
        ]
        # Separate rows, as a model's projections return them.
        self.rows = [rows[:, :n].clone() for rows in self.joint]
        self.image = [rows[:, n:].clone() for rows in self.joint]
        self.reference = ra.Reference(*self.image[1:])
        self.weights = {w: self.reference._replace(weight=torch.full((1,), w, device=device)) for w in (0.5, 1.0)}

    def eager(self) -> dict[str, Callable[[], torch.Tensor]]:
        q, k, v = self.rows
        return {
            "plain": partial(host_attention, q, k, v),
            "ours": partial(ra.joint, q, k, v, [self.reference], host_attention),
            "concatenation": partial(concatenation, q, k, v, self.reference),
            "in place": partial(host_attention, q, *self.joint[1:]),
            "merged": partial(ra.weighted, q, k, v, [self.weights[1.0]]),
            "weighted": partial(ra.weighted, q, k, v, [self.weights[0.5]]),
        }

    def masked(self) -> dict[str, Callable[[], torch.Tensor]]:
        n, rows = self.shape.n, self.shape.n + self.shape.r
        mask = torch.zeros(rows, rows, device=self.joint[0].device, dtype=self.joint[0].dtype)
        mask[n:, :n] = -torch.inf
        return {"mask": partial(host_attention, *self.joint, mask)}

    def compiled(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {"flex": flex(*self.joint, self.shape.n), "fused": fused(*self.rows, self.reference)}

    @torch.inference_mode()
    def check(self, report: Report, calls: dict[str, Callable[[], torch.Tensor]]) -> None:
        """A sample of the queries: the scores of all of them at once would fill the memory."""
        (q, k, v), n = self.rows, self.shape.n
        sample = torch.arange(0, n, max(1, n // 128), device=q.device)
        seen = {"plain": [], "weighted": [self.weights[0.5]]}
        image = explicit_attention.restricted(*self.image, [])
        for name, call in calls.items():
            out = call()
            expected = explicit_attention.restricted(q[:, sample], k, v, seen.get(name, [self.reference]))
            report.check(f"{self.shape.title}, attention, {name}", out[:, sample], expected, LIMITS[q.dtype])
            if out.shape[1] > n:
                report.check(f"{self.shape.title}, attention, {name}, image", out[:, n:], image, LIMITS[q.dtype])


class Steps:
    """One network, and its step without a reference, with a cached one, and with its branch in the step."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        plain = RandomModel(
            "Wan 2.1 14B", device, dtype, dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads,
            num_layers=shape.layers, freq_dim=shape.frequencies, text_dim=shape.text_width, text_len=shape.text,
        ).model
        self.base = plain.model
        tensors = tiny_model.video_adapter(plain, rank=shape.rank)
        self.adapter = method.adapter_from({key: tensor.to(device, dtype) for key, tensor in tensors.items()})
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(1, 16, 1, *shape.reference, generator=generator)
        reference = method.video_reference(self.adapter, latent, VideoIdentityConfig())
        patched = sampling.apply(plain, reference)
        self.references = sampling.models.attachment(patched, sampling.KEY)
        self.options = {
            **patched.model_options["transformer_options"],
            "wrappers": comfy.patcher_extension.copy_nested_dicts(patched.wrappers),
        }
        self.x = torch.randn(1, 16, *shape.video, generator=generator).to(device)
        self.text = torch.randn(1, shape.text, shape.text_width, generator=generator).to(device, dtype)
        self.latent = self.base.process_latent_in(latent).to(device)
        self.blocks = frozenset(range(shape.layers))

    @torch.inference_mode()
    def plain(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self._step(x, {})

    @torch.inference_mode()
    def cached(self, x: torch.Tensor | None = None) -> torch.Tensor:
        return self._step(x, self.options)

    def every(self, x: torch.Tensor | None = None) -> torch.Tensor:
        self.references.cache.clear()
        return self.cached(x)

    @torch.inference_mode()
    def prefill(self) -> object:
        size = reference_pass.token_grid(self.base.diffusion_model, self.x)
        return reference_pass.reference_kv(
            self.base, self.adapter, self.latent, blocks=self.blocks, video_size=size, options={}
        )

    def _step(self, x, options):
        x = self.x if x is None else x
        return self.base.apply_model(x, x.new_full((1,), 0.5), c_crossattn=self.text, transformer_options=options)

    def check(self, report: Report, shape: Shape) -> None:
        with mock.patch.object(ra, "joint", defined_rows):
            expected = self.every()
        out = self.every()
        report.check(f"{shape.title}, step, cached", out, expected, LIMITS[report.dtype])
        if not torch.equal(self.cached(), out):
            raise WrongResultError("the step that fills the cache differs from the one that reads it")
        if torch.equal(self.plain(), out):
            raise WrongResultError("a step with the reference is one without it")

    def check_flops(self, shape: Shape) -> None:
        """The formulas against a count of one frame, where even attention without a kernel fits."""
        one = replace(shape, video=(1, *shape.video[1:]))
        x = self.x[:, :, :1]
        self.cached(x)
        counts = (
            ("plain step", partial(self.plain, x), step_flops(one)),
            ("cached step", partial(self.cached, x), step_flops(one, reference=True)),
            ("prefill", self.prefill, prefill_flops(one)),
        )
        for name, call, expected in counts:
            # PyTorch knows the FLOPs of matrix products, but not those of every attention kernel.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                call()
            counted = counter.get_total_flops()
            if counted != expected:
                raise WrongResultError(
                    f"{name} of one frame: {counted:.6g} FLOPs counted, {expected:.6g} by formula"
                )

    def report_memory(self, report: Report, shape: Shape, published: Shape) -> None:
        """R5 of a network of all blocks: cache and adapter grow with them, the buffers do not."""
        if report.device.type != "cuda":
            return
        peaks = []
        self.references.cache.clear()
        for calls in ((self.plain,), (self.cached, self.cached)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for call in calls:
                call()
            peaks.append(torch.cuda.max_memory_allocated())
        # The adapter was there in both.
        extra = peaks[1] - peaks[0] + adapter_bytes(shape)
        base, whole = (cache_bytes(s) + adapter_bytes(s) for s in (shape, published))
        report.figure(
            f"R5 extra peak / (cache + adapter), of {published.layers} blocks", [(extra - base + whole) / whole],
            shape.title, goal=MEMORY_AIM.get(shape.title, ""), counted=extra_peak_bytes(published) / whole,
        )
        report.figure("extra peak", [extra / 2**20], f"{shape.title}, {shape.layers} blocks", "MiB")


def measure(report: Report, published: Shape) -> None:
    """R1, R2, R4, R5, R3 of a mask, and the forms without a copy, of one shape."""
    for each in [published, *(LARGE if report.small else [])]:
        for line in arithmetic(each):
            report.note(line)
    shape = replace(published, layers=LAYERS)
    attentions, n, r = Attentions(shape, report.device, report.dtype), shape.n, shape.r
    calls = attentions.eager()
    attentions.check(report, calls)
    with torch.inference_mode():
        attention = interleaved(calls, report.rounds, report.device)
    report.times(f"{shape.title}, attention", attention)
    ours = attention["ours"]
    report.figure(
        "R2 ours / concatenation", quotients(ours, attention["concatenation"]), shape.title, goal="≤ 1.0", counted=1.0
    )
    # The rows of the attention would raise the peak that R5 measures.
    del calls, attentions
    _measure_steps(report, shape, published, attention)
    attentions = Attentions(shape, report.device, report.dtype)
    calls = {"ours": attentions.eager()["ours"], **attentions.masked()}
    attentions.check(report, calls)
    with torch.inference_mode():
        times = interleaved(calls, report.rounds, report.device)
    report.figure(
        "R3 ours / mask", quotients(times["ours"], times["mask"]), shape.title, goal="≤ 0.80", counted=n / (n + r)
    )


def _measure_steps(report: Report, shape: Shape, published: Shape, attention: dict[str, list[float]]) -> None:
    steps = Steps(shape, report.device, report.dtype)
    steps.check(report, shape)
    ways = {"plain": steps.plain, "cached": steps.cached, "branch in it": steps.every, "prefill": steps.prefill}
    with torch.inference_mode():
        times = interleaved(ways, report.rounds, report.device)
    report.times(f"{shape.title}, step of {shape.layers} blocks", times)
    plain, cached, every, prefill = times.values()
    whole, branch = step_flops(shape, reference=True), prefill_flops(shape)
    counted, aim = whole / step_flops(shape), AIMS.get(shape.title, "≤ 1.022")
    report.figure("R1 cached / plain", quotients(cached, plain), shape.title, goal=aim, counted=counted, least=True)
    for form in ("in place", "merged"):
        saved = [a - b for a, b in zip(attention["ours"], attention[form], strict=True)]
        other = [c - shape.layers * s for c, s in zip(cached, saved, strict=True)]
        report.figure(f"R1 {form} / plain", quotients(other, plain), shape.title, counted=counted)
    once = [(p + CALLS * c) / (CALLS * e) for p, c, e in zip(prefill, cached, every, strict=True)]
    report.figure(
        "R4 prefill once / in every step", once, shape.title, goal="≤ 0.99",
        counted=(whole + branch / CALLS) / (whole + branch),
    )
    steps.report_memory(report, shape, published)
    steps.check_flops(shape)


def measure_480p(report: Report) -> None:
    measure(report, SMALL if report.small else LARGE[0])


def measure_720p(report: Report) -> None:
    measure(report, LARGE[1])


def measure_compiled(report: Report) -> None:
    """R3 of flex, and a compiled merge beside ours."""
    shape = LARGE[0]
    attentions, n, r = Attentions(shape, report.device, report.dtype), shape.n, shape.r
    calls = {"ours": attentions.eager()["ours"], **attentions.compiled()}
    attentions.check(report, calls)
    with torch.inference_mode():
        times = interleaved(calls, report.rounds, report.device)
    report.times(f"{shape.title}, attention", times)
    joint = n * (n + r)
    report.figure(
        "R3 ours / flex", quotients(times["ours"], times["flex"]), shape.title, goal="≤ 1.0",
        counted=joint / (joint + r * r),
    )
    report.figure("fused merge / ours", quotients(times["fused"], times["ours"]), shape.title, counted=1.0)
