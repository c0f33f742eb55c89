"""Restricted self-attention: a Wan step with and without a reference, and our attention compared with other forms.

`python tests/benchmarks/restricted_attention.py [--rounds 10] [--layers 2] [--no-flex]`, on a GPU if there is one:
with the shapes of Wan 14B there (832 x 480 and 1280 x 720, 81 frames; a reference of 512 x 512), else a small one.
Rounds are interleaved, so that drift affects all forms equally. Before anything is timed, every output is checked
against the fp32 definition, and counts by formula against PyTorch's own count.

The attention alone: `ours`, the K/V buffer and ComfyUI's attention; `concatenation`, as in the official code, with
the same attention; `mask`, one joint attention of video and reference under an additive mask; `flex`, the same
with a block mask, compiled, on a GPU only. The last two get their joint rows prepared, which favours them. `weighted`
is ours with a strength of 0.5; it runs PyTorch's kernels, which ComfyUI's attention on the CPU does not.

A step runs through the nodes' own code; on a GPU, on a network of a few random blocks of the model's true width:
without a reference, with its rows from the cache, and with the reference's branch in every step.

    R1  cached / plain                 R2  ours / concatenation          R3  ours / mask, ours / flex
    R4  (prefill + CALLS cached steps) / (CALLS steps with the branch in each)
    R5  extra peak memory / (cache + adapter), on a GPU; by arithmetic elsewhere

The values by arithmetic are printed first, for the 14B shapes and the one that runs: an R1 below its count of FLOPs
means that the measurement is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("tests", "workflows")]

from support import benchmark  # noqa: E402

benchmark.start(__name__ == "__main__")

import comfy.patcher_extension  # noqa: E402
import torch  # noqa: E402
from benchmarks.restricted_attention_counts import (  # noqa: E402
    CALLS,
    LARGE,
    SMALL,
    Shape,
    adapter_bytes,
    cache_bytes,
    extra_peak_bytes,
    prefill_flops,
    print_arithmetic,
    step_flops,
)
from comfy.ldm.modules.attention import optimized_attention  # noqa: E402
from pack.kernels import restricted_attention as ra  # noqa: E402
from pack.nodes.video_identity import method, reference_pass, sampling  # noqa: E402
from pack.nodes.video_identity.config import VideoIdentityConfig  # noqa: E402
from support import explicit_attention, tiny_model  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

# Relative error of a whole output; leaving out a reference makes 0.1 or more.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


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


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    out, expected = out.float(), expected.float()
    return float((out - expected).norm() / expected.norm())


def check(name: str, out: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    difference = error(out, expected)
    print(f"  {name:<34}differs from the definition by {difference:.1e}")
    # Also false for NaN.
    if not difference <= limit:
        sys.exit(f"{name} differs by more than {limit:g}: nothing is timed")


def attention_calls(
    shape: Shape, device: torch.device, dtype: torch.dtype, with_flex: bool
) -> dict[str, Callable[[], object]]:
    """The forms of the attention alone, each checked."""
    n, r, heads = shape.n, shape.r, shape.heads
    generator = torch.Generator(device).manual_seed(0)
    joint = [torch.randn(1, n + r, heads, 128, generator=generator, device=device).to(dtype) for _ in range(3)]
    # Separate rows, as a model's projections return them.
    q, k, v = (rows[:, :n].clone() for rows in joint)
    q_i, k_i, v_i = (rows[:, n:].clone() for rows in joint)
    reference = ra.Reference(k_i, v_i)
    half = ra.Reference(k_i, v_i, torch.full((1,), 0.5, device=device))
    mask = torch.zeros(n + r, n + r, device=device, dtype=dtype)
    mask[n:, :n] = -torch.inf
    calls: dict[str, Callable[[], object]] = {
        "plain": partial(host_attention, q, k, v),
        "ours": partial(ra.joint, q, k, v, [reference], host_attention),
        "concatenation": partial(concatenation, q, k, v, reference),
        "mask": partial(host_attention, *joint, mask),
        "weighted": partial(ra.weighted, q, k, v, [half]),
    }
    if with_flex:
        calls["flex"] = flex(*joint, n)
    # A sample of the queries: the scores of all of them at once would fill the memory.
    sample = torch.arange(0, n, max(1, n // 128), device=device)
    videos = {"plain": [], "weighted": [half]}
    image = explicit_attention.restricted(q_i, k_i, v_i, [])
    with torch.inference_mode():
        for name, call in calls.items():
            out = call()
            expected = explicit_attention.restricted(q[:, sample], k, v, videos.get(name, [reference]))
            check(f"{shape.title}, attention, {name}", out[:, sample], expected, LIMITS[dtype])
            if out.shape[1] > n:
                check(f"{shape.title}, attention, {name}, image", out[:, n:], image, LIMITS[dtype])
    return calls


class Steps:
    """One network, and its step without a reference, with a cached one, and with its branch in the step."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        plain = tiny_model.wan(
            dtype=dtype, dim=shape.width, ffn_dim=shape.ffn, num_heads=shape.heads, num_layers=shape.layers,
            freq_dim=shape.frequencies, text_dim=shape.text_width, text_len=shape.text,
        )
        self.base = plain.model.to(device)
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

    def check(self, shape: Shape, dtype: torch.dtype) -> None:
        with mock.patch.object(ra, "joint", defined_rows):
            expected = self.every()
        out = self.every()
        check(f"{shape.title}, step, cached", out, expected, LIMITS[dtype])
        print(f"  {shape.title}, a step without the reference is {error(self.plain(), out):.1e} from one with it")
        if not torch.equal(self.cached(), out):
            sys.exit("the step that fills the cache differs from the one that reads it: nothing is timed")

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
                sys.exit(f"{name} of one frame: {counted:.6g} FLOPs counted, {expected:.6g} by formula")
        print(f"  {shape.title}, FLOPs of a step of one frame and of a prefill are as PyTorch counts them")


def print_times(shape: Shape, what: str, times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{shape.title:<12}{what:<11}{name:<16}{median:>11.3f}{min(values):>11.3f}{max(values):>11.3f}")


def print_ratio(name: str, ratios: list[float], counted: float | None = None, least: bool = False) -> None:
    median = statistics.median(ratios)
    beside = "" if counted is None else f"  {counted:.4f} in FLOPs"
    if least and median < counted:
        beside += ": less than the FLOPs allow, so this measurement is wrong"
    print(f"  {name:<34}{median:.4f} ({min(ratios):.4f} to {max(ratios):.4f}){beside}")


def quotients(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def print_memory(shape: Shape, steps: Steps, published: Shape) -> None:
    """R5 of this network, and of one of all blocks: cache and adapter grow with them, the buffers do not."""
    peaks = []
    steps.identities.cache.clear()
    for calls in ((steps.plain,), (steps.cached, steps.cached)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for call in calls:
            call()
        peaks.append(torch.cuda.max_memory_allocated())
    # The adapter was there in both.
    extra = peaks[1] - peaks[0] + adapter_bytes(shape)
    base, whole = (cache_bytes(s) + adapter_bytes(s) for s in (shape, published))
    print(f"  R5 of {shape.layers} blocks: {extra / base:.3f}, {extra / 2**20:.0f} MiB over a peak of "
          f"{peaks[0] / 2**20:.0f}; of {published.layers} blocks: {(extra - base + whole) / whole:.3f}  "
          f"{extra_peak_bytes(published) / whole:.3f} by arithmetic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the network whose steps are timed")
    parser.add_argument("--no-flex", action="store_true", help="where torch.compile finds no compiler")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, "
          f"{dtype}, {optimized_attention.__name__}")
    for shape in LARGE:
        print_arithmetic(shape)
    for published in LARGE if device.type == "cuda" else [SMALL]:
        shape = replace(published, layers=arguments.layers)
        if device.type == "cpu":
            print_arithmetic(shape)
        calls = attention_calls(shape, device, dtype, device.type == "cuda" and not arguments.no_flex)
        with torch.inference_mode():
            attention = benchmark.interleaved(calls, arguments.rounds, device)
        # The joint rows and the mask of a 14B shape would raise the peak that R5 measures.
        del calls
        steps = Steps(shape, device, dtype)
        steps.check(shape, dtype)
        steps.check_flops(shape)
        ways = {"plain": steps.plain, "cached": steps.cached, "branch in it": steps.every, "prefill": steps.prefill}
        with torch.inference_mode():
            times = benchmark.interleaved(ways, arguments.rounds, device)
        print(f"{'shape':<12}{'what':<11}{'form':<16}{'median ms':>11}{'min':>11}{'max':>11}")
        print_times(shape, "attention", attention)
        print_times(shape, "step", times)
        plain, cached, every, prefill = times.values()
        whole = step_flops(shape, reference=True)
        n, r = shape.n, shape.r
        print_ratio("R1 cached / plain", quotients(cached, plain), whole / step_flops(shape), least=True)
        print_ratio("R2 ours / concatenation", quotients(attention["ours"], attention["concatenation"]), 1.0)
        print_ratio("R3 ours / mask", quotients(attention["ours"], attention["mask"]), n / (n + r))
        if "flex" in attention:
            joint = n * (n + r)
            print_ratio("R3 ours / flex", quotients(attention["ours"], attention["flex"]), joint / (joint + r * r))
        once = [(p + CALLS * c) / (CALLS * e) for p, c, e in zip(prefill, cached, every, strict=True)]
        branch = prefill_flops(shape)
        print_ratio("R4 prefill once / in every step", once, (whole + branch / CALLS) / (whole + branch))
        print_ratio("ours / plain attention", quotients(attention["ours"], attention["plain"]), 1 + r / n)
        print_ratio("weighted / ours", quotients(attention["weighted"], attention["ours"]), 1.0)
        if device.type == "cuda":
            print_memory(shape, steps, published)
        del steps, ways


if __name__ == "__main__":
    main()
