"""What the theatre's training scripts share: rendered pictures kept on disk, and stages that stop and go on."""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pack.nodes.puppets import render, world

SAVE_SECONDS = 180
REPORT_STEPS = 50
WARM_UP_STEPS = 50


def _render_range(start: int, stop: int, split: str, size: int) -> np.ndarray:
    return np.stack([render.render(world.sample_take(i, split), size).image for i in range(start, stop)])


def pictures(folder: Path, split: str, count: int, size: int) -> np.ndarray:
    """uint8 [count, H, W, 3] of takes 0..count-1 of a split, rendered once and kept in `folder`."""
    path = folder / f"{split}_{count}_{size}.npy"
    if not path.exists():
        print(f"rendering {count} pictures ({split})", flush=True)
        temporary = path.with_suffix(".part")
        starts = range(0, count, 500)
        stops = [min(start + 500, count) for start in starts]
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        with ProcessPoolExecutor(os.cpu_count()) as pool, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in pool.map(_render_range, starts, stops, [split] * len(stops), [size] * len(stops)):
                file.write(part.tobytes())
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [B, H, W, 3] to channels-last float [B, 3, H, W] in [0, 1], the range of TAESD's own networks."""
    tensor = torch.from_numpy(np.array(images)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)


def autocast(device):
    """bf16 where the processor has it; elsewhere it is emulated, several times slower than fp32."""
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def reconstruction_loss(output, target):
    """Colours, and the differences of neighbours: the ink lines are few pixels, and all of the drawing."""
    difference = output - target
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised (Jordan 2024), matrices of one shape together.

    torch.optim.Muon iterates in bf16, one matrix at a time: on two CPU cores without bf16 a step of the UNet took
    5.3 s with it and 1.2 s with this.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for parameter in group["params"]:
                if parameter.grad is None:  # had no part in this step
                    continue
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                shapes.setdefault(tuple(parameter.shape), []).append((parameter, nesterov))
            for (rows, columns), pairs in shapes.items():
                steps = orthogonalised(torch.stack([step for _, step in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (parameter, _), step in zip(pairs, steps, strict=True):
                    parameter.add_(step, alpha=-group["lr"] * scale)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """[N, rows, columns] with singular values near 1: five quintic Newton-Schulz steps, Jordan's coefficients."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimiser:
    """Muon for hidden weight matrices (convolutions flattened to [out, in * k * k]), AdamW for everything else.

    Tried on the autoencoder: 200 steps reach 19.0 dB, where AdamW alone reaches 16.7 dB.
    """

    def __init__(self, module: torch.nn.Module, matrix_rate: float, rate: float):
        self.matrices, others = [], []
        for name, parameter in module.named_parameters():
            # Embeddings, the first and the last layers are no hidden matrices; Muon's authors leave them to AdamW.
            outer = "embedding" in name or name.endswith("head.head.weight")
            hidden = parameter.ndim in (2, 4, 5) and min(parameter.shape[:2]) > 8 and not outer
            if parameter.requires_grad:
                (self.matrices if hidden else others).append(parameter)
        # Views of the same storage, since Muon takes matrices only.
        self.views = [torch.nn.Parameter(_flat(parameter.data)) for parameter in self.matrices]
        self.parts = {}
        if self.views:
            self.parts["muon"] = Muon(self.views, lr=matrix_rate)
        if others:
            self.parts["adamw"] = torch.optim.AdamW(others, lr=rate, weight_decay=1e-4, betas=(0.9, 0.99))
        self.parameters = [*self.matrices, *others]
        self.rates = {"muon": matrix_rate, "adamw": rate}

    def step(self, loss: torch.Tensor, scale: float) -> None:
        """One step down the gradient of `loss` with learning rates times `scale`."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for view, parameter in zip(self.views, self.matrices, strict=True):
            view.grad = None if parameter.grad is None else _flat(parameter.grad, parameter)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self.rates[name] * scale
            part.step()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _flat(weight: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """[out, ...] as [out, n] in the element order of `like`: a view of a weight in either memory layout."""
    like = weight if like is None else like
    if like.ndim > 3 and not like.is_contiguous():  # channels last
        weight = weight.movedim(1, -1)
    return weight.flatten(1)


class Learnt(torch.nn.Module):
    """Parameters by the names that the pack gives them."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__()
        self.names = {name.replace(".", "/"): name for name in parameters}
        for key, name in self.names.items():
            self.register_parameter(key, parameters[name])

    def part(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Copies of the parameters under a prefix, without it."""
        return {
            name.removeprefix(prefix): self.get_parameter(key).detach().clone()
            for key, name in self.names.items() if name.startswith(prefix)
        }

    def frozen(self) -> "Learnt":
        """Another of the same values, for an average."""
        return Learnt({name: torch.nn.Parameter(tensor, False) for name, tensor in self.part().items()})


def follow(average: torch.nn.Module, live: torch.nn.Module, index: int, decay: float) -> None:
    """The exponential moving average before step `index`, which forgets its first steps sooner."""
    if index:
        decay = min(decay, (1 + index) / (10 + index))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)


class Stage:
    """One stage's steps with its optimiser, saved every few minutes and resumed from what is on disk.

    `modules` are saved whole. Learning rates warm up, then fall to 0 along a cosine over `steps`.
    """

    def __init__(self, path: Path, optimiser: Optimiser, steps: int, modules: dict, deadline: float):
        self.path, self.optimiser, self.steps, self.modules = path, optimiser, steps, modules
        self.deadline = deadline
        self.done, self.log = 0, []
        if path.exists():
            device = optimiser.parameters[0].device
            state = torch.load(path, map_location=device, weights_only=True)
            self.done, self.log = state["done"], state["log"]
            self.optimiser.load_state_dict(state["optimiser"])
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])

    def save(self) -> None:
        state = {"done": self.done, "log": self.log, "optimiser": self.optimiser.state_dict(),
                 "modules": {key: module.state_dict() for key, module in self.modules.items()}}
        temporary = self.path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def run(self, step: Callable[[int], torch.Tensor], report: Callable[[], str] = lambda: "") -> bool:
        """Call `step(i)`, which draws its data from i alone and returns the loss, until done or the deadline.

        True when every step is done. Raises FloatingPointError, saving nothing, when a loss is not finite.
        """
        started = saved = time.monotonic()
        first, losses = self.done, []
        while self.done < self.steps and time.monotonic() < self.deadline:
            warm = min(1.0, (self.done + 1) / WARM_UP_STEPS)
            loss = step(self.done)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} at step {self.done} of {self.path.stem}; not saved")
            self.optimiser.step(loss, warm * 0.5 * (1 + math.cos(math.pi * self.done / self.steps)))
            self.done += 1
            losses.append(loss.item())
            if self.done % REPORT_STEPS == 0 or self.done == self.steps:
                pace = (self.done - first) / (time.monotonic() - started)
                extra = report() if self.done % (5 * REPORT_STEPS) == 0 or self.done == self.steps else ""
                print(f"{self.path.stem} {self.done}/{self.steps} loss {np.mean(losses):.4f} "
                      f"{pace:.2f} steps/s {extra}", flush=True)
                self.log.append([self.done, float(np.mean(losses))])
                losses.clear()
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.done >= self.steps
