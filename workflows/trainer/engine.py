"""Trainings over processes and machines, on Hugging Face's accelerate: what starts them is `accelerate launch`.

Gradients come together in PyTorch's DistributedDataParallel, each batch is divided among the processes, and all
make the same steps, so a run is that of one process but for rounding.
"""

import itertools
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from pack.nodes.training.parallel import Engine, Share, computing
from tqdm import tqdm

from .encodings import Encodings

# What divides weights or AdamW's moments among processes, which the trainings read by parameter: TRAINING.md.
_REFUSED = {
    DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}


class Stopped(Exception):
    """The training was asked to stop, and all processes did so after the same step."""


def accelerator(folder: Path, accumulation: int | None) -> Accelerator:
    """What accelerate's own configuration asks for, with its trackers in `folder`.

    `accumulation` is how many shares of a step a process computes in turn, if accelerate's configuration should not
    say it. Raises ValueError, in words, for what a training of this pack cannot be run with.
    """
    steps = accumulation or int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
    # A single frame does not reach layers in time; buffers are those of frozen models.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    made = Accelerator(
        gradient_accumulation_steps=steps, log_with="tensorboard", project_dir=str(folder), kwargs_handlers=[ddp]
    )
    if kind := _REFUSED.get(made.distributed_type):
        raise ValueError(
            f"{kind} divides what is trained among the processes, and steps, checkpoints and results need it whole: "
            "use accelerate's MULTI_GPU, and for less memory the node's offload and gradient_checkpointing"
        )
    if made.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision is {made.mixed_precision}, in which small gradients vanish: use bf16, or no and the "
            "node's own dtype"
        )
    return made


def started(made: Accelerator, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What to say of the processes at the start; accelerate starts a single one where it was asked for more without
    --multi_gpu, as with --cpu, and then sets a port at which nobody else will come.
    """
    count, steps = made.num_processes, made.gradient_accumulation_steps
    lines = [f"Processes: {count}, on {made.device.type}; parts of a step in each: {steps}"]
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if count == 1 and launched and "WORLD_SIZE" not in environment:
        lines.append(
            "accelerate was asked for more and started one process: add --multi_gpu, on CPUs with "
            "ACCELERATE_USE_CPU=true before the command instead of --cpu"
        )
    return lines


class Parallel(Engine):
    """Runs the trainings of one process among `accelerator.num_processes`."""

    def __init__(self, accelerator: Accelerator, cache: Path, name: str = "training"):
        self.accelerator, self.cache, self.name = accelerator, cache, name
        self.processes = accelerator.num_processes
        self.accumulation = accelerator.gradient_accumulation_steps
        self.main = accelerator.is_main_process
        self.module: torch.nn.Module | None = None
        self.asked = self.stopping = False

    def stop(self) -> None:
        """Ask for a stop: all processes stop after the step in which the first of them was asked."""
        self.asked = True

    def prepared(self, objective: Any, parameters: dict, optimiser: Any) -> tuple[Any, Any]:
        self.module, optimiser = self.accelerator.prepare(_Trained(objective, parameters), optimiser)
        return self.module, optimiser

    def gradients(self, objective: Any, step: int, generators: Callable[[], torch.Generator]) -> float:
        total, count = 0.0, self.processes * self.accumulation
        for part in range(self.accumulation):
            share = Share(self.accelerator.process_index * self.accumulation + part, count)
            with self.accelerator.accumulate(objective):
                loss = objective(step, generators(), share)
                total += float(loss.detach())
                # The mean of DDP's processes and of accelerate's shares, where the sum is wanted.
                self.accelerator.backward(loss * count)
        told = torch.tensor([[total, float(self.asked)]], dtype=torch.float64, device=self.accelerator.device)
        told = self.accelerator.gather(told)
        self.stopping = bool(told[:, 1].any())
        return float(told[:, 0].sum())  # not finite everywhere if it is in one

    def clipped(self, parameters: dict[str, torch.nn.Parameter], norm: float) -> float:
        return float(self.accelerator.clip_grad_norm_(list(parameters.values()), norm))

    def everyone(self, rows: torch.Tensor) -> torch.Tensor:
        if self.processes == 1:
            return rows
        return torch.cat(torch.distributed.nn.functional.all_gather(rows))

    def watched(self, monitor: Any) -> Any:
        return _Watched(self, monitor)

    def agreed(self, value: Any) -> Any:
        """The main process's value."""
        return broadcast_object_list([value])[0] if self.processes > 1 else value

    def encoded(self, what: str, key: Callable[[], str], count: int, encode: Callable[[int], Any]) -> Sequence[Any]:
        """Each encoding is made by one process and written to a file, which all of them read when it is drawn."""
        stored = Encodings(self.cache / f"{what}-{self.agreed(key() if self.main else None)}", count)
        missing = self.agreed(stored.missing() if self.main else None)
        rounds = range(math.ceil(len(missing) / self.processes))
        for i in tqdm(rounds, desc=f"{what}: encoding", disable=not self.main or not missing):
            own = i * self.processes + self.accelerator.process_index
            if own < len(missing):
                stored.write(missing[own], encode(missing[own]))
            self.accelerator.wait_for_everyone()  # one that has died is noticed here
        return stored


class _Trained(torch.nn.Module):
    """The objective as a module, for what wraps modules."""

    def __init__(self, objective: Any, parameters: dict):
        super().__init__()
        self.objective = objective
        self.trained = torch.nn.ParameterList(parameters.values())

    def forward(self, step: int, generator: torch.Generator, share: Share) -> torch.Tensor:
        with computing(share):
            return self.objective(step, generator)


class _Watched:
    """The node's monitor in the main process, with a bar on the terminal and TensorBoard; others only stop."""

    def __init__(self, engine: Parallel, monitor: Any):
        self.engine, self.monitor = engine, monitor
        self.bar = None

    def check(self) -> None:
        if self.engine.stopping:
            raise Stopped
        if self.engine.main:
            self.monitor.check()

    def progress(self, step: int, loss: float) -> None:
        if not self.engine.main:
            return
        config = self.monitor.config
        if self.bar is None:
            phase = self.monitor.phase or f"{self.engine.name}: "
            self.bar = tqdm(total=config.steps, initial=step - 1, desc=phase.strip(": "), unit="step")
        self.bar.update(1)
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        rate = config.learning_rate_at(step - 1)
        self.engine.accelerator.log({f"{self.monitor.phase}loss": loss, f"{self.monitor.phase}rate": rate}, step)
        self.monitor.progress(step, loss)
        if step == config.steps:
            self.bar.close()

    def checkpoint(self, state: Any) -> None:
        self.monitor.checkpoint(state)

    def warn(self, line: str) -> None:
        if self.engine.main:
            self.monitor.warn(line)


def stopping_on_signals(engine: Parallel) -> None:
    """Ctrl-C and SIGTERM end the training after its step, with a checkpoint; a second one ends one alone at once."""
    asked = itertools.count()

    def handle(number: int, _frame: Any) -> None:
        if next(asked) and engine.processes == 1:  # torchrun repeats to its own what the terminal sent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        engine.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
