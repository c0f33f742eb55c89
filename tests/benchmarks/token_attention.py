"""Recording the attention to the subject: columns against the whole map, and a step with and without it (R7).

`python tests/benchmarks/token_attention.py [--rounds 10] [--family sd15]`, on a GPU if there is one. Rounds are
interleaved, so that drift affects all equally. Before anything is timed, the columns are checked against fp64, the
recorded step's output against the plain one's, bit for bit, and its map against that of the whole maps.

A step is one CFG call (batch 2, the subject in one half) of ComfyUI's own UNet through the patches that the nodes
set: `theatre` with its weights, `sd15` (512 x 512) and `sdxl` (1024 x 1024) with random ones. Without `--family`
this is the theatre on a CPU and all of them on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import uuid
from functools import partial
from pathlib import Path
from unittest import mock

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("tests", "workflows")]

from support import benchmark  # noqa: E402

benchmark.start(__name__ == "__main__")

import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from pack.kernels.token_attention import chunk_rows, token_attention  # noqa: E402
from pack.nodes.identity_prior import attention  # noqa: E402
from pack.nodes.identity_prior.config import MaskConfig  # noqa: E402
from pack.nodes.puppets import theatre  # noqa: E402
from support import real_configurations  # noqa: E402

COLUMNS = (2, 3)
# The recorded layers of each family, for one branch of CFG: queries, tokens, heads, width.
ATTENTIONS = {
    "theatre, 16 x 16": (256, 40, 2, 32),
    "SD 1.5 at 512, 32 x 32": (1024, 77, 8, 80),
    "SDXL at 1024, 64 x 64": (4096, 77, 10, 64),
    "Wan 14B at 832 x 480 x 81": (32760, 512, 40, 128),
}
# The family's real configuration, its latent, its tokens and its other inputs.
FAMILIES = {
    "theatre": (None, (8, 16, 16), 40, None),
    "sd15": ("SD 1.5", (4, 64, 64), 77, None),
    "sdxl": ("SDXL", (4, 128, 128), 77, 2816),
}


def whole_map(q: torch.Tensor, k: torch.Tensor, heads: int, columns) -> torch.Tensor:
    """The same shares from all probabilities, as an attention that returns them would give."""
    width = q.shape[-1] // heads
    q, k = (x.unflatten(-1, (heads, width)).transpose(1, 2).float() for x in (q, k))
    return ((q @ k.mT) * width**-0.5).softmax(-1)[..., list(columns)].sum(-1).mean(1)


class Step:
    """One CFG call of a family's UNet: plain, or with a recorder."""

    def __init__(self, family: str, device: torch.device, dtype: torch.dtype):
        name, latent, tokens, pooled = FAMILIES[family]
        model = _theatre() if name is None else _random(name, device, dtype)
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, generator=generator).to(device)

        context = model.model.model_config.unet_config["context_dim"]
        self.x, self.sigma = drawn(*latent), torch.ones(2, device=device)
        self.conditions = {"c_crossattn": drawn(tokens, context)} | ({"y": drawn(pooled)} if pooled else {})
        self.plain_model, self.model = model, attention.with_recorder(model)
        self.layers = attention.layers_of(model)
        self.ids = [uuid.uuid4(), uuid.uuid4()]
        self.entries = {self.ids[0]: (COLUMNS, tokens)}

    def plain(self) -> torch.Tensor:
        return self._run(self.plain_model, {})

    def watched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's output, and the map as the blend reads it."""
        recorder = attention.AttentionRecorder(self.entries, self.layers, MaskConfig(), self.x[:1].shape)
        return self._run(self.model, {attention.KEY: recorder}), recorder.heat()

    def by_whole_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        with mock.patch.object(attention, "token_attention", whole_map):
            return self.watched()

    def _run(self, model, extra: dict) -> torch.Tensor:
        options = {**model.model_options["transformer_options"], **extra}
        options |= {"cond_or_uncond": [0, 1], "uuids": self.ids, "sigmas": self.sigma}
        with torch.inference_mode():
            return model.model.apply_model(self.x, self.sigma, transformer_options=options, **self.conditions)

    def check(self) -> None:
        out, heat = self.watched()
        assert torch.equal(out, self.plain()), "the recorder changed the step"
        torch.testing.assert_close(heat, self.by_whole_maps()[1], rtol=1e-4, atol=1e-5)


def _theatre():
    theatre.register()
    return comfy.sd.load_checkpoint_guess_config(str(benchmark.CHECKPOINT))[0]


def _random(name: str, device: torch.device, dtype: torch.dtype):
    real = real_configurations.REAL_CONFIGURATIONS[name]
    config = real.host_class({**real.unet_config, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
        parameter.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, device, device)


def report(title: str, times: dict[str, list[float]], against: str, note: str = "") -> None:
    for op, values in times.items():
        ratios = [a / b for a, b in zip(values, times[against], strict=True)]
        spread = "" if op == against else (
            f"  {statistics.median(ratios):.4f} of {against} ({min(ratios):.4f} to {max(ratios):.4f})"
        )
        print(f"{title:<28}{op:<16}{statistics.median(values):>11.3f} ms{spread}{note if op == 'columns' else ''}")


def compare_attentions(rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    """The columns and the whole map of one layer, and the cross-attention that is computed anyway."""
    for title, (queries, tokens, heads, width) in ATTENTIONS.items():
        rows = chunk_rows(1, queries, tokens, heads, width)
        share = rows * (tokens + width) / (queries * tokens)
        if device.type == "cpu" and queries > 10_000:
            print(f"{title:<28}waits for a GPU; bytes at once {share:.2%} of the whole map's")
            continue
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, n, heads * width, generator=generator) for n in (queries, tokens))
        expected = whole_map(q.double(), k.double(), heads, COLUMNS)
        q, k = q.to(device, dtype), k.to(device, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2  # of inputs that are rounded
        torch.testing.assert_close(
            token_attention(q, k, heads, COLUMNS).cpu().float(), expected.float(), rtol=tolerance, atol=1e-5
        )
        layer = partial(
            torch.nn.functional.scaled_dot_product_attention,
            *(x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, k)),
        )
        calls = {
            "columns": partial(token_attention, q, k, heads, COLUMNS),
            "whole map": partial(whole_map, q, k, heads, COLUMNS), "attention": layer,
        }
        with torch.inference_mode():
            times = benchmark.interleaved(calls, rounds, device, lambda _name: 10, warm_up=1)
        report(title, times, "whole map", f"; bytes at once {share:.2%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--family", choices=tuple(FAMILIES), help="of the step")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.float16) if cuda else (torch.device("cpu"), torch.float32)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {dtype}, {arguments.rounds} rounds")
    compare_attentions(arguments.rounds, device, dtype)
    chosen = [arguments.family] if arguments.family else list(FAMILIES) if cuda else ["theatre"]
    for family in FAMILIES:
        if family not in chosen:
            print(f"step of {family}: waits for a GPU, or --family {family}")
            continue
        step = Step(family, device, dtype)
        step.check()
        calls = {"plain": step.plain, "columns": step.watched, "whole maps": step.by_whole_maps}
        repeats = 4 if family == "theatre" else 1
        times = benchmark.interleaved(calls, arguments.rounds, device, lambda _name, count=repeats: count, warm_up=1)
        layers = len(attention.chosen_layers(step.layers, MaskConfig(), max(step.x.shape[-2:])))
        report(f"step of {family}", times, "plain", f"; R7, {layers} of {len(step.layers)} layers watched")


if __name__ == "__main__":
    main()
