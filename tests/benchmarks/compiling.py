"""TorchCompileModel: no recompiling after the first run, before and after our node, and R1 of compiled steps.

On a GPU with ComfyUI's node and its code generation; on a CPU the compiler's front end alone, which decides about
recompiling.
"""

from __future__ import annotations

import torch
from benchmarks.apply_nodes import Applied, action_identifier, release, video_identity
from benchmarks.spectral_guidance import Clock
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from support.benchmark import Report, WrongResultError, in_turn, quotients
from support.random_models import RandomModel

STEPS = 3
# Of a step beside the same model that is not compiled: rounding in bf16 grows over steps.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def compiled(model, report: Report):
    if report.small:
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return model
    return TorchCompileModel.execute(model, "inductor").result[0]


def measure(report: Report) -> None:
    """A Wan of two blocks with Apply Video Identity, and SD 1.5 with Apply Action Identifier."""
    wan = RandomModel("Wan 2.1 14B", report.device, report.dtype, narrow=report.small, num_layers=2)
    _check(report, wan, video_identity(wan), "Apply Video Identity")
    del wan
    release(report.device)
    if report.small:
        report.note("SD 1.5 with Apply Action Identifier waits for a GPU: tracing a UNet takes a minute")
        return
    unet = RandomModel("SD 1.5", report.device, report.dtype)
    _check(report, unet, action_identifier(unet), "Apply Action Identifier")


def _check(report: Report, made: RandomModel, applied: Applied, node: str) -> None:
    shape = f"{made.family}, compiled"

    def sample(model, seed: int = 3, callback=None) -> torch.Tensor:
        positive = applied.positive or made.conditioning(1)
        return made.sample(model, positive=positive, steps=STEPS, cfg=1.0, seed=seed, callback=callback)

    torch._dynamo.reset()
    expected = sample(applied.model)
    fast = compiled(applied.model, report)
    report.check(f"{shape}, {node}", sample(fast), expected, LIMITS[report.dtype])
    with torch._dynamo.config.patch(error_on_recompile=True):
        if torch.equal(sample(fast, seed=8), expected):
            raise WrongResultError(f"{shape}: {node} gives the same for other noise")
    report.figure(f"recompiles after the first run, {node}", [0], shape, goal="≤ 0")
    if report.small or applied.positive:
        return
    models = {"plain": compiled(made.model, report), "with the node": fast}
    sample(models["plain"])

    def step(name: str) -> float:
        clock = Clock(report.device)
        sample(models[name], callback=clock)
        return clock.step()

    times = in_turn(models, step, report.rounds, warm_up=1)
    report.times(f"{shape}, sampler step", times)
    report.figure("R1 cached / plain", quotients(times["with the node"], times["plain"]), shape)
