"""The training loop that every script of the theatre shares, on Hugging Face's accelerate.

A stage is a module whose call returns a loss, and a function that draws the batch of a step from that step's own
random numbers. A stage that was interrupted therefore takes the same steps as one that was not. The code is the same
on a CPU and on CUDA, for one process and under `accelerate launch`.
"""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from optimisers import KernelMuon, split_parameters
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

SAVE_SECONDS = 180
LOG_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rates: a short warm-up, a plateau, then a cosine to zero over the last `cool_down` of `steps`.

    On the plateau nothing depends on `steps`, so a stage can go on with a later end.
    """

    steps: int
    cool_down: int
    warm_up: int = 50

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by at `step`, counted from 0."""
        left = max(0, self.steps - step)
        cooled = 1.0 if left >= self.cool_down else 0.5 * (1 - math.cos(math.pi * left / self.cool_down))
        return min(1.0, (step + 1) / self.warm_up) * cooled


@dataclasses.dataclass
class Stage:
    """One training run. `rate` is AdamW's, `matrix_rate` is Muon's.

    draw(rng, step) returns the batch, tensors on the CPU; module(*batch) returns the loss, a scalar. inspect(average)
    returns a line of figures and a sample sheet, uint8 [H, W, 3], for the averaged module.
    """

    name: str
    module: torch.nn.Module
    draw: Callable[[np.random.Generator, int], Sequence[torch.Tensor]]
    schedule: Schedule
    matrix_rate: float
    rate: float
    ema: float
    seed: int
    outer: tuple[str, ...] = ()  # names of first and last layers, which AdamW trains
    inspect: Callable[[torch.nn.Module], tuple[str, np.ndarray]] | None = None
    matrix_decay: float = 0.0  # Muon's weight decay
    settings: dict[str, object] = dataclasses.field(default_factory=dict)  # kept beside the state, for `record`


def make_accelerator() -> Accelerator:
    """bf16 where the processor has it; elsewhere PyTorch emulates it, several times slower than fp32."""
    cuda = torch.cuda.is_available()
    native = cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # single frames do not reach layers in time
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if native else "no", kwargs_handlers=[unused])


def trained(module: torch.nn.Module, folder: Path, name: str) -> bool:
    """Load the averaged weights of a stage into `module`. False where that stage has no state."""
    path = _recovered(folder / name) / "average.safetensors"
    if not path.exists():
        return False
    module.load_state_dict(load_file(path))
    return True


def record(folder: Path, names: Iterable[str]) -> dict[str, object]:
    """Of each stage its steps done and the settings of the run that ended it, for an exported file's metadata."""
    found = {}
    for name in names:
        path = _recovered(folder / name) / "progress.json"
        progress = json.loads(path.read_text()) if path.exists() else {}
        found[name] = {"steps": progress.get("step", 0), **progress.get("settings", {})}
    return found


def run(stage: Stage, folder: Path, minutes: float = math.inf, sheet_minutes: float = 5.0) -> bool:
    """Train until the last step, the end of `minutes`, or a SIGTERM; True after the last step.

    State, losses and sample sheets lie in `folder`/`stage.name`, beside nothing else of that stage. Raises
    FloatingPointError, saving nothing, for a loss that is not finite.
    """
    return _Run(stage, folder / stage.name, minutes, sheet_minutes).go()


class _Run:
    def __init__(self, stage: Stage, state: Path, minutes: float, sheet_minutes: float):
        self.stage, self.state, self.sheet_seconds = stage, state, 60 * sheet_minutes
        self.deadline = time.monotonic() + 60 * minutes
        self.step, self.stopping = 0, False
        self.accelerator = make_accelerator()
        stage.module.to(self.accelerator.device).train()
        self.average = AveragedModel(stage.module, multi_avg_fn=self._follow).requires_grad_(False)
        matrices, others = split_parameters(stage.module, stage.outer)
        optimisers = []
        if matrices:
            optimisers.append((stage.matrix_rate, KernelMuon(matrices, stage.matrix_rate, stage.matrix_decay)))
        if others:
            adamw = torch.optim.AdamW(others, stage.rate, weight_decay=1e-4, betas=(0.9, 0.99))
            optimisers.append((stage.rate, adamw))
        self.parameters = matrices + others
        self.module, *prepared = self.accelerator.prepare(stage.module, *(part for _, part in optimisers))
        self.optimisers = [(rate, part) for (rate, _), part in zip(optimisers, prepared, strict=True)]
        self.sheets = state.parent / f"{state.name}_sheets"
        self.log = state.parent / f"{state.name}_losses.csv"

    def go(self) -> bool:
        self._resume()
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGTERM, previous)
        self._save()
        self.accelerator.wait_for_everyone()
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        return self.step >= self.stage.schedule.steps

    def _loop(self) -> None:
        saved = shown = marked = time.monotonic()
        losses: list[float] = []
        while self.step < self.stage.schedule.steps and not self._out_of_time():
            losses.append(self._one_step())
            now = time.monotonic()
            if self.step % LOG_STEPS == 0 or self.step == self.stage.schedule.steps:
                figures = ""
                if now - shown > self.sheet_seconds or self.step == self.stage.schedule.steps:
                    figures, shown = self._inspect(), now
                self._write_line(np.mean(losses), len(losses) / (now - marked), figures)
                losses, marked = [], time.monotonic()
            if now - saved > SAVE_SECONDS:
                self._save()
                saved = now

    def _one_step(self) -> float:
        seeds = [self.stage.seed, sum(map(ord, self.stage.name)), self.step, self.accelerator.process_index]
        batch = self.stage.draw(np.random.default_rng(seeds), self.step)
        loss = self.module(*(part.to(self.accelerator.device) for part in batch))
        self.stage.module.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        value = self.accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss {value} at step {self.step} of {self.stage.name}; nothing was saved")
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        factor = self.stage.schedule.factor(self.step)
        for rate, optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        self.average.update_parameters(self.stage.module)
        self.step += 1
        return value

    def _follow(self, averages: list, weights: list, count: torch.Tensor) -> None:
        """The exponential moving average, which forgets its first steps sooner."""
        decay = min(self.stage.ema, (1 + count.item()) / (10 + count.item()))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _out_of_time(self) -> bool:
        stop = self.stopping or time.monotonic() > self.deadline
        if self.accelerator.num_processes > 1:  # all of them stop at the same step
            stop = self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)).item() > 0
        return stop

    def _inspect(self) -> str:
        if self.stage.inspect is None or not self.accelerator.is_main_process:
            return ""
        with torch.no_grad(), self.accelerator.autocast():
            figures, sheet = self.stage.inspect(self.average.module.eval())
        self.sheets.mkdir(exist_ok=True)
        Image.fromarray(sheet).save(self.sheets / f"{self.step:07}.jpg", quality=92)
        return figures

    def _write_line(self, loss: float, pace: float, figures: str) -> None:
        if not self.accelerator.is_main_process:
            return
        row = [self.step, f"{loss:.5f}", f"{self.stage.schedule.factor(self.step - 1):.4f}", f"{pace:.3f}", figures]
        with open(self.log, "a", newline="") as file:
            csv.writer(file).writerow(row)
        name, end = self.stage.name, self.stage.schedule.steps
        print(f"{name} {self.step}/{end} loss {loss:.4f} {pace:.2f} steps/s {figures}", flush=True)

    def _save(self) -> None:
        """The whole state into a new folder that then takes the place of the last one."""
        part, old = (self.state.with_name(f"{self.state.name}.{end}") for end in ("part", "old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        if self.accelerator.is_main_process:
            save_file({k: v.contiguous() for k, v in self.average.module.state_dict().items()},
                      part / "average.safetensors")
            progress = {"step": self.step, "stage": self.stage.name, "settings": self.stage.settings}
            (part / "progress.json").write_text(json.dumps(progress))
            if self.state.exists():
                os.replace(self.state, old)
            os.replace(part, self.state)
            shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        state = _recovered(self.state)
        if not state.exists():
            if self.accelerator.is_main_process:
                state.parent.mkdir(parents=True, exist_ok=True)
                self.log.write_text("step,loss,rate,steps_per_second,figures\n")
            return
        self.accelerator.load_state(str(state))
        self.step = json.loads((state / "progress.json").read_text())["step"]
        self.average.module.load_state_dict(load_file(state / "average.safetensors"))
        self.average.n_averaged.fill_(self.step)
        if self.accelerator.is_main_process:  # a killed run has logged steps that were not saved
            header, *rows = self.log.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(row.split(",")[0]) <= self.step]
            self.log.write_text("".join([header, *kept]))


def _recovered(state: Path) -> Path:
    """`state`, after undoing a save that was killed between its two renames."""
    old = state.with_name(f"{state.name}.old")
    if old.exists() and not state.exists():
        os.replace(old, state)
    return state
