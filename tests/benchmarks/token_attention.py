"""R7: a step with and without recording the attention to the subject; columns against the whole map.

Before anything is timed, the columns are checked against fp64, the recorded step's output against the plain one's,
bit for bit, and its map against that of the whole maps.

A step is one CFG call (batch 2, the subject in one half) of ComfyUI's own UNet with random weights, through the
patches that the nodes set: SD 1.5 at 512 x 512, SDXL at 1024 x 1024.
"""

from __future__ import annotations

import uuid
from functools import partial
from unittest import mock

import torch
from pack.kernels.token_attention import chunk_rows, token_attention
from pack.nodes.identity_prior import attention
from pack.nodes.identity_prior.config import MaskConfig
from support.benchmark import Report, WrongResultError, interleaved, quotients
from support.random_models import RandomModel

COLUMNS = (2, 3)
# The recorded layers of each family, for one branch of CFG: queries, tokens, heads, width.
ATTENTIONS = {
    "SD 1.5 at 512, 32 x 32": (1024, 77, 8, 80),
    "SDXL at 1024, 64 x 64": (4096, 77, 10, 64),
    "Wan 14B at 832 x 480 x 81": (32760, 512, 40, 128),
}


def whole_map(q: torch.Tensor, k: torch.Tensor, heads: int, columns, added=None) -> torch.Tensor:
    """The same shares from all probabilities, as an attention that returns them would give."""
    width = q.shape[-1] // heads
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.unflatten(-1, (heads, width)).transpose(1, 2).to(exact) for x in (q, k))
    scores = (q @ k.mT) * width**-0.5
    return (scores if added is None else scores + added).softmax(-1)[..., list(columns)].sum(-1).mean(1)


class Step:
    """One CFG call of a family's UNet: plain, or with a recorder."""

    def __init__(self, family: str, report: Report):
        model = RandomModel(family, report.device, report.dtype, narrow=report.small)
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, generator=generator).to(report.device)

        self.x, self.sigma = drawn(*model.latent), torch.ones(2, device=report.device)
        self.conditions = {"c_crossattn": drawn(model.tokens, model.width).to(report.dtype)}
        if model.pooled:
            self.conditions["y"] = drawn(model.network.label_emb[0][0].in_features).to(report.dtype)
        self.plain_model, self.model = model.model, attention.with_recorder(model.model)
        self.layers = attention.layers_of(model.model)
        self.ids = [uuid.uuid4(), uuid.uuid4()]
        self.entries = {self.ids[0]: (COLUMNS, model.tokens)}

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

    def check(self, report: Report, shape: str) -> None:
        out, heat = self.watched()
        if not torch.equal(out, self.plain()):
            raise WrongResultError("the recorder changed the step")
        report.check(f"{shape}, the step's map", heat, self.by_whole_maps()[1], 1e-4)


def measure_attentions(report: Report) -> None:
    """The columns and the whole map of one layer, and the cross-attention that is computed anyway."""
    for title, (queries, tokens, heads, width) in ATTENTIONS.items():
        rows = chunk_rows(1, queries, tokens, heads, width)
        share = rows * (tokens + width) / (queries * tokens)
        report.figure("R7 bytes at once / the whole map's", [share], title)
        if report.small and queries > 2_000:
            continue
        generator = torch.Generator().manual_seed(0)
        q, k = (
            torch.randn(1, n, heads * width, generator=generator).to(report.device, report.dtype)
            for n in (queries, tokens)
        )
        some = slice(0, 512)
        expected = whole_map(q[:, some].cpu().double(), k.cpu().double(), heads, COLUMNS)
        report.check(f"{title}, columns", token_attention(q, k, heads, COLUMNS)[:, some], expected, 1e-4)
        layer = partial(
            torch.nn.functional.scaled_dot_product_attention,
            *(x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, k)),
        )
        calls = {
            "columns": partial(token_attention, q, k, heads, COLUMNS),
            "whole map": partial(whole_map, q, k, heads, COLUMNS), "attention": layer,
        }
        with torch.inference_mode():
            times = interleaved(calls, report.rounds, report.device, lambda _name: 5, warm_up=1)
        report.times(title, times)
        report.figure("columns / whole map", quotients(times["columns"], times["whole map"]), title)


def measure_steps(report: Report) -> None:
    """R7, by columns and by whole maps."""
    for family in ("SDXL", "SD 1.5"):
        step = Step(family, report)
        layers = len(attention.chosen_layers(step.layers, MaskConfig(), max(step.x.shape[-2:])))
        shape = f"{family}, {layers} of {len(step.layers)} layers watched"
        step.check(report, shape)
        calls = {"plain": step.plain, "columns": step.watched, "whole maps": step.by_whole_maps}
        times = interleaved(calls, report.rounds, report.device, warm_up=1)
        report.times(f"{shape}, step", times)
        report.figure(
            "R7 step with capture / without", quotients(times["columns"], times["plain"]), shape,
            goal="≤ 1.02" if family == "SDXL" else "",
        )
