"""Weights that leave the device: the same result in fp32 when a half of them goes in mid run, and in training."""

from __future__ import annotations

import torch
from benchmarks import training
from benchmarks.apply_nodes import peak_memory, release, video_identity
from support.benchmark import Report, WrongResultError, in_turn, quotients
from support.random_models import RandomModel

CPU = torch.device("cpu")
STEPS = 4


def measure(report: Report) -> None:
    _sampling(report)
    release(report.device)
    _training(report)


def _sampling(report: Report) -> None:
    """A Wan with Apply Video Identity."""
    made = RandomModel(
        "Wan 2.1 14B", report.device, torch.float32, narrow=report.small, offload=CPU, num_layers=4
    )
    made.latent = (16, 3, *made.latent[-2:])
    patched, freed = video_identity(made).model, []

    def make_room(step, *_state) -> None:
        if step == 0:
            freed.append(patched.partially_unload(CPU, patched.model_size() // 2))

    whole = made.sample(patched, steps=STEPS, cfg=1.0)
    patched.detach()
    half = made.sample(patched, steps=STEPS, cfg=1.0, callback=make_room)
    patched.detach()
    if not freed or freed[0] < patched.model_size() // 4:
        raise WrongResultError(f"of {patched.model_size()} bytes {freed} were freed")
    report.check("Apply Video Identity, half of the weights off the device", half, whole, 1e-5)
    report.figure("weights that left the device", [freed[0] / 2**20], "Wan, 4 blocks, fp32", "MiB")


def _training(report: Report) -> None:
    """SD 1.5: losses, steps and memory with and without offload."""
    data, steps = training.random_data(report), 3 if report.small else 8
    runs = {
        name: training.ours(*data, 1, training.ATTENTION, offload=name == "offload") for name in ("whole", "offload")
    }
    losses = {}
    for name, run in runs.items():
        release(report.device)
        with peak_memory(report.device) as peak:
            losses[name] = torch.tensor(run(steps, training.Clock()))
        if peak:
            report.figure(f"training, {name}, peak", [peak[0] / 2**20], "SD 1.5, batch 1", "MiB")
    report.check("losses with offload", losses["offload"], losses["whole"], 1e-5)

    def seconds(name: str) -> float:
        clock = training.Clock()
        runs[name](steps, clock)
        return clock.seconds()

    times = in_turn(runs, seconds, min(3, report.rounds))
    report.figure("training step, offload / whole", quotients(times["offload"], times["whole"]), "SD 1.5, batch 1")
