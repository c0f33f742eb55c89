"""R1 to R5 by arithmetic: FLOPs and bytes of a Wan step with and without a reference."""

from dataclasses import dataclass

# Stand-In: 20 steps, two halves of CFG.
CALLS = 40
# The attention's share of the rate of matrix products; assumed, not measured: R1 is then 1.018 and 1.010.
ATTENTION_RATE = 0.8
# FLOPs per byte at the peak rates in the H100's data sheet: 989 TFLOP/s in bf16, 3.35 TB/s.
BALANCE = 295


@dataclass(frozen=True)
class Shape:
    """A Wan transformer, the latents of its video and reference, [frames,] height and width, and the adapter."""

    title: str
    video: tuple[int, int, int]
    reference: tuple[int, int]
    heads: int
    ffn: int
    layers: int
    rank: int
    bytes: int
    text: int = 512
    text_width: int = 4096
    frequencies: int = 256

    @property
    def n(self) -> int:
        """Tokens of the video."""
        return self.video[0] * (self.video[1] // 2) * (self.video[2] // 2)

    @property
    def r(self) -> int:
        """Tokens of the reference."""
        return (self.reference[0] // 2) * (self.reference[1] // 2)

    @property
    def width(self) -> int:
        return self.heads * 128


LARGE = [
    Shape("14B, 480p", (21, 60, 104), (64, 64), 40, 13824, 40, 128, 2),
    Shape("14B, 720p", (21, 90, 160), (64, 64), 40, 13824, 40, 128, 2),
]
SMALL = Shape("small", (1, 30, 52), (16, 16), 4, 1408, 2, 16, 4, text=64, text_width=16)


def attention_flops(shape: Shape, rate: float = 1.0) -> float:
    """Of the video's self-attention in all blocks, without a reference; divided by `rate`."""
    return shape.layers * 4 * shape.n**2 * shape.width / rate


def reference_flops(shape: Shape, rate: float = 1.0) -> float:
    """Of the reference's columns in it: what R1 costs."""
    return shape.layers * 4 * shape.n * shape.r * shape.width / rate


def other_flops(shape: Shape) -> float:
    """Of everything else in a step at batch 1."""
    n, d, text = shape.n, shape.width, shape.text
    block = 8 * n * d**2 + 4 * n * d**2 + 4 * text * d**2 + 4 * n * text * d + 4 * n * d * shape.ffn
    ends = 2 * 2 * n * 64 * d + 2 * text * (shape.text_width * d + d**2) + _time_flops(shape)
    return shape.layers * block + ends


def step_flops(shape: Shape, rate: float = 1.0, reference: bool = False) -> float:
    """Of a whole step, with the rows of a cached reference or without."""
    total = attention_flops(shape, rate) + other_flops(shape)
    return total + (reference_flops(shape, rate) if reference else 0)


def prefill_flops(shape: Shape) -> float:
    """Of one pass over the reference; the last block needs no more than its keys and values."""
    r, d, rank = shape.r, shape.width, shape.rank
    projection = 2 * r * d**2 + 4 * r * d * rank
    rest = projection + 2 * r * d**2 + 4 * r**2 * d + 4 * r * d * shape.ffn
    return shape.layers * 2 * projection + (shape.layers - 1) * rest + 2 * r * 64 * d + _time_flops(shape)


def _time_flops(shape: Shape) -> int:
    return 2 * (shape.frequencies * shape.width + 7 * shape.width**2)


def cache_bytes(shape: Shape) -> int:
    """Keys and values of the reference in every block."""
    return shape.layers * 2 * shape.r * shape.width * shape.bytes


def adapter_bytes(shape: Shape) -> int:
    return shape.layers * 3 * 2 * shape.width * shape.rank * shape.bytes


def buffer_bytes(shape: Shape) -> int:
    """The two buffers of one block, which live as long as its attention."""
    return 2 * (shape.n + shape.r) * shape.width * shape.bytes


def copied_bytes(shape: Shape) -> int:
    """Read and written, in all blocks, to fill them."""
    return 2 * buffer_bytes(shape) * shape.layers


def merged_bytes(shape: Shape) -> int:
    """Moved in all blocks where two segments are merged instead, without their log-sum-exps.

    The queries once more, the second result written, both read and one written.
    """
    return 5 * shape.n * shape.width * shape.bytes * shape.layers


def extra_peak_bytes(shape: Shape) -> float:
    """What a step takes beyond a plain one: cache, adapter, and the part of the buffers above its peak.

    Activations in rows of the width, as ComfyUI's block holds them: 6 in the self-attention (x, its modulated norm,
    q, k, v, out), and in the feed-forward x, its norm and the hidden rows before and after GELU.
    """
    row = shape.n * shape.width * shape.bytes
    attention, ffn = 6 * row, (2 + 2 * shape.ffn / shape.width) * row
    above = max(attention + buffer_bytes(shape), ffn) - max(attention, ffn)
    return cache_bytes(shape) + adapter_bytes(shape) + above


def arithmetic(shape: Shape) -> list[str]:
    """R1 to R5 of this shape in words."""
    n, r = shape.n, shape.r
    plain, with_reference = step_flops(shape), step_flops(shape, reference=True)
    kernel = [step_flops(shape, ATTENTION_RATE, reference) for reference in (True, False)]
    copying, merging = (BALANCE * moved(shape) for moved in (copied_bytes, merged_bytes))
    joint = attention_flops(shape) + reference_flops(shape)
    branch = with_reference + prefill_flops(shape)
    base = cache_bytes(shape) + adapter_bytes(shape)
    return [
        f"{shape.title}: {n} + {r} tokens, {shape.heads} x 128, {shape.layers} blocks, by arithmetic",
        f"  R1  {with_reference / plain:.4f} in FLOPs ({plain:.4g} plain), {kernel[0] / kernel[1]:.4f} with "
        f"attention at {ATTENTION_RATE} of the rate; copying K and V ({copied_bytes(shape) / 2**20:.0f} MiB) adds "
        f"{copying / plain:.4f} at {BALANCE} FLOPs a byte, merging two segments {merging / plain:.4f}",
        f"  R2  1 for the same copies; without any {joint / (joint + copying):.4f} at {BALANCE} FLOPs a byte",
        f"  R3  {n / (n + r):.4f} in FLOPs of a mask, {n * (n + r) / (n * (n + r) + r * r):.4f} of flex",
        f"  R4  {(with_reference + prefill_flops(shape) / CALLS) / branch:.4f} in FLOPs ({CALLS} calls; prefill "
        f"{prefill_flops(shape):.4g})",
        f"  R5  {extra_peak_bytes(shape) / base:.3f}: cache {cache_bytes(shape) / 2**20:.0f} MiB, adapter "
        f"{adapter_bytes(shape) / 1e6:.0f} MB, buffers of a block {buffer_bytes(shape) / 2**20:.0f} MiB",
    ]
