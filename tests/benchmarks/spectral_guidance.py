"""Spectral guidance: analytic gradient against autograd, and its cost compared with one UNet step.

`python tests/benchmarks/spectral_guidance.py [--rounds 10] [--no-unet]`, on a GPU if there is one. Rounds are
interleaved, so that drift affects all equally. Every output is checked against fp64 before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "workflows")]

from launcher import environment, scripts  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
scripts.alias_pack()

import torch  # noqa: E402
from pack.kernels import spectral_guidance as sg  # noqa: E402
from support import benchmark  # noqa: E402

# Name, latent, and the family's UNet: (block channels, transformer layers, heads, context, pooled or None).
ROWS = [
    ("SD 1.5, 512 x 512", (1, 4, 64, 64), ((320, 640, 1280, 1280), (1, 1, 1, 0), 8, 768, None)),
    ("SDXL, 1024 x 1024", (1, 4, 128, 128), ((320, 640, 1280), (0, 2, 10), (5, 10, 20), 2048, 2816)),
]


def autograd_gradient(x: torch.Tensor, s: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The same losses through torch.fft and autograd."""
    x = x.detach().requires_grad_()
    spectrum, other = torch.fft.fft2(x, norm="ortho"), torch.fft.fft2(d, norm="ortho")
    amplitude = 0.5 * (spectrum.abs() - torch.fft.fft2(s, norm="ortho").abs()).square().sum()
    phase = (spectrum.abs() * (1 - torch.cos(spectrum.angle() - other.angle()))).sum()
    return torch.autograd.grad(amplitude + phase, x)[0]


def unet_step(
    device: torch.device, dtype: torch.dtype, latent: tuple[int, ...], family: tuple
) -> Callable[[], object]:
    """One CFG step (batch 2) of a UNet with random weights and the family's real dimensions."""
    from diffusers import UNet2DConditionModel

    channels, layers, heads, context, pooled = family
    crosses = [bool(count) for count in layers]
    extra = {}
    if pooled is not None:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": pooled,
        }
    with torch.device(device):
        unet = (
            UNet2DConditionModel(
                sample_size=latent[-1],
                block_out_channels=channels,
                cross_attention_dim=context,
                attention_head_dim=heads,
                transformer_layers_per_block=[max(1, count) for count in layers],
                use_linear_projection=pooled is not None,
                down_block_types=["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crosses],
                up_block_types=[
                    "CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crosses)
                ],
                **extra,
            )
            .to(dtype)
            .eval()
        )
        x = torch.randn(2, *latent[1:], dtype=dtype)
        tokens = torch.randn(2, 77, context, dtype=dtype)
        added = None
        if pooled is not None:
            added = {
                "text_embeds": torch.randn(2, pooled - 6 * 256, dtype=dtype),
                "time_ids": torch.ones(2, 6),
            }
        moment = torch.tensor(500)

    def step() -> object:
        with torch.inference_mode():
            return unet(x, moment, tokens, added_cond_kwargs=added)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-unet", action="store_true", help="time the kernels only")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    print(f"{'latent':<20}{'op':<20}{'median ms':>11}{'min':>9}{'max':>9}{'  ratio'}")
    for title, shape, family in ROWS:
        generator = torch.Generator().manual_seed(0)
        exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        x, s, d = (v.float().to(device) for v in exact)
        target = sg.prepare(s, d)
        reference = autograd_gradient(*exact)
        for gradient in (sg.gradient(x, target), autograd_gradient(x, s, d)):
            torch.testing.assert_close(gradient.double().cpu(), reference, rtol=0, atol=1e-4)
        calls: dict[str, Callable[[], object]] = {
            "analytic gradient": partial(sg.gradient, x, target),
            "autograd gradient": partial(autograd_gradient, x, s, d),
            "per_bin update": partial(sg.update, x, target, 0.1, 0.3),
            "gradient update": partial(sg.update, x, target, 0.1, 0.3, "gradient"),
        }
        if not arguments.no_unet:
            calls["UNet step"] = unet_step(
                device, torch.float16 if device.type == "cuda" else torch.float32, shape, family
            )
        times = benchmark.interleaved(
            calls, arguments.rounds, device, lambda name: 1 if name == "UNet step" else 20
        )
        base = {"analytic gradient": "autograd gradient"}
        for op, values in times.items():
            against = base.get(op, "UNet step")
            ratio = ""
            if against in times and against != op:
                ratios = [a / b for a, b in zip(values, times[against], strict=True)]
                ratio = f"  {statistics.median(ratios):.4f} of {against}"
            median = statistics.median(values)
            print(f"{title:<20}{op:<20}{median:>11.4f}{min(values):>9.4f}{max(values):>9.4f}{ratio}")


if __name__ == "__main__":
    main()
