"""R8: samples per second of the pack's LoRA training, of ComfyUI's TrainLoraNode and of a plain PEFT loop.

All three train on the same latents with equal rank, batch and numeric type, in interleaved rounds. TrainLoraNode
always trains every layer, hence the row "all linear layers" of ours beside the row "attention", which PEFT is
compared with. Only steps are timed, not what a run sets up before its first one (TrainLoraNode reads the checkpoint
again).

Before anything is timed, every loss must be finite, and those of ours and of PEFT, from the same start, must be equal
at every step. As part of run.py it trains SD 1.5 with random weights.

`python tests/benchmarks/training.py [--rounds 10] [--steps 8]` trains the theatre instead, on eight rendered
puppets, and compares the learning itself, too: the error of the predicted noise on the eight pictures, with the same
noises and levels for all, after a number of steps from the start.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("tests", "workflows")]

from support import benchmark  # noqa: E402

if __name__ == "__main__":
    benchmark.start(True)

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_train import TrainLoraNode  # noqa: E402
from pack.nodes.puppets import captions, render, theatre, world  # noqa: E402
from pack.nodes.training import loop, objective  # noqa: E402
from pack.nodes.training.config import LoraConfig, TrainingConfig  # noqa: E402
from pack.nodes.training.lora import LoraLayers  # noqa: E402
from pack.nodes.training.seeds import seed_for  # noqa: E402
from pack.nodes.training.session import session  # noqa: E402
from support.random_models import RandomModel  # noqa: E402

RANK, RATE, PICTURES, BATCHES = 8, 1e-4, 8, (1, 4)
CURVE_STEPS, CURVE_RATE, CURVE_LEVELS = (0, 50, 100), 1e-3, 8
ATTENTION = LoraConfig().layers
comfy.utils.PROGRESS_BAR_ENABLED = False

# finish(denoiser) -> a measure of what was learned, taken while it is attached
Finish = Callable[[object], float]
# run(steps, clock, rate, finish) -> every step's loss, or the figure of `finish`
Run = Callable[..., list[float] | float]


class Clock:
    """A monitor, also usable as ComfyUI's progress hook, that records the time after every step."""

    def __init__(self):
        self.times: list[float] = []

    def check(self) -> None:
        pass

    def progress(self, *_state, **_rest) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def checkpoint(self, _state) -> None:
        pass

    def warn(self, _line) -> None:
        pass

    def seconds(self) -> float:
        """Seconds per step, without the first one, which warms up."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def theatre_data():
    """The shipped model, eight rendered puppets as latents [1, 16, 16, 16], and their captions encoded."""
    theatre.register()
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(benchmark.CHECKPOINT))[:3]
    takes = [world.sample_take(i, "validation") for i in range(PICTURES)]
    with torch.no_grad():
        latents = [vae.encode(torch.from_numpy(render.render(take).image)[None].float() / 255) for take in takes]
        texts = [clip.encode_from_tokens_scheduled(clip.tokenize(captions.caption(take))) for take in takes]
    return model, [model.model.process_latent_in(latent) for latent in latents], texts


def random_data(report: benchmark.Report):
    """SD 1.5 with random weights, random latents and prompts."""

    def build() -> RandomModel:
        return RandomModel("SD 1.5", report.device, report.dtype, narrow=report.small)

    made, seeds = build(), range(PICTURES)
    # TrainLoraNode reads its model once more from the file.
    made.model.cached_patcher_init = (lambda disable_dynamic: build().model, ())
    return made.model, [made.noise(i) for i in seeds], [made.conditioning(100 + i) for i in seeds]


def samples_of(denoiser, latents, prompts) -> list[objective.Sample]:
    return [
        objective.Sample(latent.to(denoiser.device), denoiser.prepare(prompt, latent))
        for latent, prompt in zip(latents, prompts, strict=True)
    ]


def noise_error(latents, prompts) -> Finish:
    """Mean error of the predicted noise on all pictures, at fixed noises and levels."""

    def figure(denoiser) -> float:
        goal = objective.DenoisingObjective(denoiser, [], TrainingConfig(steps=1, learning_rate=RATE))
        generator = torch.Generator().manual_seed(12345)
        total = 0.0
        with torch.no_grad():
            for sample in samples_of(denoiser, latents, prompts):
                for level in torch.linspace(10, len(denoiser.sigmas) - 10, CURVE_LEVELS).long():
                    noise = torch.randn(sample.latent.shape, generator=generator)
                    total += float(goal.loss_at(sample.latent, [sample.conditions], noise, level[None]))
        return total / (CURVE_LEVELS * len(latents))

    return figure


def ours(model, latents, prompts, batch: int, layers: str, offload: bool = False) -> Run:
    def run(steps: int, clock: Clock, rate: float = RATE, finish: Finish | None = None):
        config = TrainingConfig(
            steps=max(1, steps), learning_rate=rate, batch_size=batch, checkpoint_every=0, offload=offload
        )
        with session(model, (batch, *latents[0].shape[1:]), config) as denoiser:
            adapters = LoraLayers(denoiser.network, LoraConfig(RANK, layers=layers), 0, denoiser.device)
            goal = objective.DenoisingObjective(denoiser, samples_of(denoiser, latents, prompts), config)
            with adapters.attached():
                losses = loop.train(goal, adapters.parameters(), config, clock) if steps else []
                return finish(denoiser) if finish else losses

    return run


def with_peft(model, latents, prompts, batch: int) -> Run:
    """The same objective, optimiser and start, with PEFT's layers in the network and a plain loop."""
    import peft

    def run(steps: int, clock: Clock, rate: float = RATE, finish: Finish | None = None):
        config = TrainingConfig(steps=max(1, steps), learning_rate=rate, batch_size=batch, checkpoint_every=0)
        with session(model, (batch, *latents[0].shape[1:]), config) as denoiser:
            start = LoraLayers(denoiser.network, LoraConfig(RANK), 0, denoiser.device).modules
            settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(start))
            peft.inject_adapter_in_model(settings, denoiser.network)
            try:
                weights = []
                for name, adapter in start.items():
                    layer = denoiser.network.get_submodule(name)
                    for part, matrix in ((layer.lora_A, adapter.down), (layer.lora_B, adapter.up)):
                        part["default"].weight.data = matrix.detach().clone()
                        weights.append(part["default"].weight)
                optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=config.weight_decay)
                goal = objective.DenoisingObjective(denoiser, samples_of(denoiser, latents, prompts), config)
                losses = []
                for step in range(steps):
                    optimiser.zero_grad(set_to_none=True)
                    loss = goal(step, torch.Generator().manual_seed(seed_for(config.seed, "step", step)))
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
                    optimiser.step()
                    losses.append(float(loss.detach()))
                    clock.progress()
                return finish(denoiser) if finish else losses
            finally:
                for name, module in list(denoiser.network.named_modules()):
                    if isinstance(module, peft.tuners.lora.LoraLayer):
                        parent, _, child = name.rpartition(".")
                        setattr(denoiser.network.get_submodule(parent), child, module.get_base_layer())

    return run


def native(model, latents, prompts, batch: int, dtype: str) -> Run:
    """ComfyUI's node in its faster mode, bypass."""

    def run(steps: int, clock: Clock, rate: float = RATE, finish: Finish | None = None):
        settings = {
            "batch_size": batch, "grad_accumulation_steps": 1, "steps": steps, "learning_rate": rate, "rank": RANK,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": dtype, "lora_dtype": "fp32",
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False,
            "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
            "bypass_mode": True,
        }
        if not steps:
            with session(model, latents[0].shape, TrainingConfig(steps=1, learning_rate=rate)) as denoiser:
                return finish(denoiser)
        comfy.utils.set_progress_bar_global_hook(clock.progress)
        try:
            result = TrainLoraNode.execute(
                model=[model], positive=list(prompts),
                latents=[{"samples": model.model.process_latent_out(x)} for x in latents],
                **{name: [value] for name, value in settings.items()},
            )
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        if finish is None:
            return result.args[1]["loss"]
        trained, _ = comfy.sd.load_lora_for_models(model, None, result.args[0], 1.0, 0)
        with session(trained, latents[0].shape, TrainingConfig(steps=1, learning_rate=rate)) as denoiser:
            return finish(denoiser)

    return run


def compared(model, latents, prompts, batch: int, cuda: bool) -> dict[str, Run]:
    """All that are installed."""
    runs = {
        "ours, attention": ours(model, latents, prompts, batch, ATTENTION),
        "ours, all linear layers": ours(model, latents, prompts, batch, "."),
        "TrainLoraNode": native(model, latents, prompts, batch, "bf16" if cuda else "fp32"),
    }
    if importlib.util.find_spec("peft"):
        runs["PEFT, attention"] = with_peft(model, latents, prompts, batch)
    return runs


def check(report: benchmark.Report, batch: int, runs: dict[str, Run], steps: int) -> None:
    """Every loss is finite, and PEFT's are ours."""
    losses = {title: torch.tensor(run(steps, Clock())) for title, run in runs.items()}
    if not all(values.isfinite().all() for values in losses.values()):
        raise benchmark.WrongResultError(f"batch {batch}: a loss is not finite")
    if "PEFT, attention" in losses:
        # bf16 rounds what is added to each layer.
        limit = 1e-3 if report.dtype == torch.float32 else 2e-2
        report.check(f"batch {batch}, losses", losses["ours, attention"], losses["PEFT, attention"], limit)
    else:
        report.note("R8 beside a PEFT loop: peft is not installed")


def time_runs(report: benchmark.Report, shape: str, batch: int, runs: dict[str, Run], steps: int) -> None:
    """R8 at this batch."""

    def seconds(title: str) -> float:
        clock = Clock()
        runs[title](steps + 1, clock)
        return clock.seconds()

    times = benchmark.in_turn(runs, seconds, report.rounds)
    for title, values in times.items():
        report.figure(f"{title}, batch {batch}", [batch / value for value in values], shape, "samples/s")
    ratios = benchmark.quotients(times["TrainLoraNode"], times["ours, all linear layers"])
    report.figure(
        f"R8 ours / TrainLoraNode, batch {batch}", ratios, shape, goal="≥ 1.3" if batch == 1 else f"≥ {0.8 * batch:g}"
    )
    if "PEFT, attention" in times:
        ratios = benchmark.quotients(times["PEFT, attention"], times["ours, attention"])
        report.figure(f"R8 ours / PEFT loop, batch {batch}", ratios, shape, goal="≥ 0.95")


def measure(report: benchmark.Report) -> None:
    """R8 of SD 1.5."""
    cuda = report.device.type == "cuda"
    data = random_data(report)
    shape, steps = f"SD 1.5, {data[1][0].shape[-1]} x {data[1][0].shape[-1]} latent", 2 if report.small else 6
    for batch in BATCHES:
        runs = compared(*data, batch, cuda)
        check(report, batch, runs, 2 if report.small else 10)
        time_runs(report, shape, batch, runs, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="a round")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    report = benchmark.Report(
        torch.device("cuda" if cuda else "cpu"), torch.float32, False, arguments.rounds, _print
    )
    model, latents, prompts = theatre_data()
    for batch in BATCHES:
        runs = compared(model, latents, prompts, batch, cuda)
        check(report, batch, runs, 20)
        if batch == BATCHES[0]:
            figure = noise_error(latents, prompts)
            for title, run in runs.items():
                curve = [run(steps, Clock(), CURVE_RATE, figure) for steps in CURVE_STEPS]
                print(f"noise error after {CURVE_STEPS} steps at {CURVE_RATE:g}  {title:<24}"
                      + "  ".join(f"{value:.4f}" for value in curve))
        time_runs(report, "theatre", batch, runs, arguments.steps)


def _print(found: dict) -> None:
    values = found.get("values")
    print(f"{found['name']}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}) {found['unit']}"
          if values else found)


if __name__ == "__main__":
    main()
