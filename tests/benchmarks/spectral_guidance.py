"""R6: a sampler's step with and without frequency guidance, and the analytic gradient beside autograd's.

A step is one CFG call of SDXL's UNet at 1024 x 1024 with random weights, and what the sampler does after it, between
two calls of the sampler's callback. Guidance acts in every step. The gradients are checked against fp64 first.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import comfy.samplers
import torch
from pack.kernels import spectral_guidance as sg
from pack.nodes.frequency_guidance import nodes
from pack.nodes.frequency_guidance.config import APPLY_TO, FrequencyGuidanceConfig
from support.benchmark import Report, WrongResultError, in_turn, interleaved, quotients
from support.random_models import RandomModel

LATENTS = {"SD 1.5, 512 x 512": (1, 4, 64, 64), "SDXL, 1024 x 1024": (1, 4, 128, 128)}
STEPS = 4


def autograd_gradient(x: torch.Tensor, s: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The same losses through torch.fft and autograd."""
    x = x.detach().requires_grad_()
    spectrum, other = torch.fft.fft2(x, norm="ortho"), torch.fft.fft2(d, norm="ortho")
    amplitude = 0.5 * (spectrum.abs() - torch.fft.fft2(s, norm="ortho").abs()).square().sum()
    phase = (spectrum.abs() * (1 - torch.cos(spectrum.angle() - other.angle()))).sum()
    return torch.autograd.grad(amplitude + phase, x)[0]


def measure_gradients(report: Report) -> None:
    """Analytic / autograd, and the updates alone."""
    for title, shape in LATENTS.items():
        generator = torch.Generator().manual_seed(0)
        exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        x, s, d = (v.float().to(report.device) for v in exact)
        target = sg.prepare(s, d)
        calls = {
            "analytic gradient": partial(sg.gradient, x, target),
            "autograd gradient": partial(autograd_gradient, x, s, d),
            "per_bin update": partial(sg.update, x, target, 0.1, 0.3),
            "gradient update": partial(sg.update, x, target, 0.1, 0.3, "gradient"),
        }
        for name in ("analytic gradient", "autograd gradient"):
            report.check(f"{title}, {name}", calls[name](), autograd_gradient(*exact), 1e-5)
        times = interleaved(calls, report.rounds, report.device, lambda _name: 20)
        report.times(title, times)
        ratios = quotients(times["analytic gradient"], times["autograd gradient"])
        report.figure("R6 analytic / autograd gradient", ratios, title, goal="≤ 0.3")


class Clock:
    """A sampler's callback: the mean time from one call to the next is a whole step."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, *_state) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def step(self) -> float:
        """Milliseconds."""
        return 1000 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def measure_step(report: Report) -> None:
    """R6 of both places where guidance acts."""
    model = RandomModel("SDXL", report.device, report.dtype, narrow=report.small)
    shape = f"SDXL, {model.latent[-1]} x {model.latent[-1]} latent"
    plain = comfy.samplers.sampler_object("euler")
    pictures = [{"samples": model.noise(seed)} for seed in (11, 12)]
    settings = dataclasses.asdict(FrequencyGuidanceConfig()) | {"end_percent": 1.0}
    samplers = {"plain": plain} | {
        place: nodes.UnderstudyFrequencyGuidanceSampler.execute(
            plain, *pictures, **{**settings, "apply_to": place}
        ).result[0] for place in APPLY_TO
    }
    results = {name: model.sample(sampler=sampler, steps=STEPS) for name, sampler in samplers.items()}
    if not all(result.isfinite().all() for result in results.values()):
        raise WrongResultError("a result is not finite")
    if any(torch.equal(results[place], results["plain"]) for place in APPLY_TO):
        raise WrongResultError("guidance changed nothing")

    def step(name: str) -> float:
        clock = Clock(report.device)
        model.sample(sampler=samplers[name], steps=STEPS, callback=clock)
        return clock.step()

    times = in_turn(samplers, step, report.rounds, warm_up=1)
    report.times(f"{shape}, sampler step", times)
    for place in APPLY_TO:
        ratios = quotients(times[place], times["plain"])
        report.figure(f"R6 step with guidance of the {place} / without", ratios, shape, goal="≤ 1.01")
