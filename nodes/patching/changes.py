"""What was done to a MODEL or CLIP since its file was loaded, as short names that tell runs apart.

All that changes what it computes counts: patched weights, adapters in bypass, hooks, replaced objects, patches,
wrappers and options. Values count by content, functions by their code and what they enclose, so that the same graph
has the same names in another session. A class of ours names in RUN_STATE what it remembers of runs, which is left
out.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import numbers
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.hooks
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import BypassInjectionManager, WeightAdapterBase

from ..fingerprint import weights_fingerprint

# Attributes of ComfyUI's ModelPatcher: what its weights become, and what else happens in its calls.
_WEIGHTS = ("patches", "weight_wrapper_patches", "injections", "hook_patches", "forced_hooks")
_CALLS = ("object_patches", "model_options", "wrappers", "callbacks", "attachments", "additional_models")
_STORED = (torch.float32, torch.float16, torch.bfloat16)
# Threads, locks, loggers and the like compute nothing; these modules of Python's have classes that hold values.
_PLUMBING = sys.stdlib_module_names - {"builtins", "collections", "types"}
_DEEPEST = 60  # objects within objects


def weight_changes(patcher: ModelPatcher) -> str:
    """16 hex digits of the LoRAs and other changes of weights on a model; empty where there are none."""
    return _name(patcher, _WEIGHTS)


def call_changes(patcher: ModelPatcher) -> str:
    """16 hex digits of the patches, replaced objects, wrappers and options on a model; empty where there are none."""
    return _name(patcher, _CALLS)


def _name(patcher: ModelPatcher, attributes: tuple[str, ...]) -> str:
    changes = {name: _without_empty(getattr(patcher, name, None)) for name in attributes}
    changes = {name: value for name, value in changes.items() if value is not None}
    return _digest(_Reader(patcher).lines(changes)) if changes else ""


def _without_empty(value: Any) -> Any:
    """None for a container that holds nothing but empty ones."""
    if isinstance(value, dict):
        return {key: kept for key, part in value.items() if (kept := _without_empty(part)) is not None} or None
    return None if value is None or isinstance(value, list | tuple | set) and not value else value


def _digest(lines: Iterator[bytes]) -> str:
    content = hashlib.sha256()
    for line in lines:
        content.update(line + b"\n")
    return content.hexdigest()[:16]


class _Reader:
    """Reads values into lines. Modules of the patched model itself stand by their kind: their weights are its own."""

    def __init__(self, patcher: ModelPatcher | None):
        self.seen: dict[int, tuple[int, Any]] = {}
        self.own = set() if patcher is None else _own_modules(patcher)
        self.depth = 0

    def lines(self, value: Any) -> Iterator[bytes]:
        """One or more lines for a value, the same for equal values in every session."""
        if value is None or isinstance(value, str | int | float | complex | bytes | torch.dtype | torch.Size):
            yield f"{type(value).__name__} {value!r}".encode()
        elif isinstance(value, numbers.Number | os.PathLike | types.ModuleType | type):
            yield str(value if isinstance(value, numbers.Number | os.PathLike) else value.__name__).encode()
        elif isinstance(value, torch.device):
            yield b"device"  # where something lies changes nothing
        elif isinstance(value, enum.Enum):
            yield str(value).encode()
        elif isinstance(value, torch.Tensor | np.ndarray):
            yield from _tensor(value)
        elif id(value) in self.seen:
            yield f"again {self.seen[id(value)][0]}".encode()
        elif self.depth < _DEEPEST:
            self.seen[id(value)] = len(self.seen), value  # held, so that no other object gets its id
            yield type(value).__name__.encode()
            self.depth += 1
            yield from self._parts(value)
            self.depth -= 1

    def _parts(self, value: Any) -> Iterator[bytes]:
        if isinstance(value, Mapping):
            for key, part in value.items():
                yield from self.lines(key)
                yield from self.lines(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from self.lines(part)
        elif isinstance(value, set | frozenset):
            yield from sorted(_digest(_Reader(None).lines(part)).encode() for part in value)
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            yield from self._function(value)
        else:
            yield from self._object(value)

    def _function(self, function: Callable) -> Iterator[bytes]:
        if isinstance(function, types.MethodType):
            yield from self.lines(function.__self__)
            yield from self.lines(function.__func__)
        elif isinstance(function, functools.partial):
            yield from self.lines((function.func, function.args, function.keywords))
        else:
            yield function.__qualname__.encode()
            yield from _code(function.__code__)
            enclosed = [_content(cell) for cell in function.__closure__ or ()]
            yield from self.lines((enclosed, function.__defaults__, function.__kwdefaults__))

    def _object(self, value: Any) -> Iterator[bytes]:
        yield from (kind.__qualname__.encode() for kind in type(value).__mro__[:-1])
        if isinstance(value, ModelPatcher):
            originals = {key: moved.weight for key, moved in value.backup.items()}
            yield weights_fingerprint(value.model.state_dict(), originals).encode()
            yield from (_name(value, attributes).encode() for attributes in (_WEIGHTS, _CALLS))
        elif isinstance(value, torch.nn.Module):
            if id(value) not in self.own:
                yield from self._module(value)
        elif isinstance(value, BypassInjectionManager):
            modules = {id(hook.adapter): hook.module for hook in value.hooks}
            for key, (adapter, strength) in value.adapters.items():
                yield from self.lines((key, strength))
                yield from self._adapter(adapter, modules.get(id(adapter)))
        elif isinstance(value, WeightAdapterBase):
            yield from self._adapter(value)
        elif isinstance(value, comfy.hooks.HookKeyframeGroup):  # it also holds where in a run it is
            frames = [(frame.strength, frame.start_percent, frame.guarantee_steps) for frame in value.keyframes]
            yield from self.lines(frames)
        elif type(value).__module__.partition(".")[0] not in _PLUMBING:
            yield getattr(value, "__qualname__", "").encode()
            yield from self.lines(_state(value))

    def _adapter(self, adapter: Any, module: torch.nn.Module | None = None) -> Iterator[bytes]:
        """An adapter's weights; in bypass ComfyUI casts them to the type of the module's, at some time."""
        if isinstance(adapter, torch.nn.Module):
            yield from self._module(adapter)
            return
        yield type(adapter).__name__.encode()
        weights = adapter.weights if isinstance(adapter.weights, list | tuple) else [adapter.weights]
        dtype = getattr(getattr(module, "weight", None), "dtype", None)
        for part in weights:
            cast = isinstance(part, torch.Tensor) and dtype in _STORED
            yield from self.lines(part.to(dtype) if cast else part)

    def _module(self, module: torch.nn.Module) -> Iterator[bytes]:
        if (compiled := getattr(module, "_orig_mod", None)) is not None:
            yield from self.lines(compiled)
            return
        state = {key: part for key, part in vars(module).items() if not key.startswith("_") and key != "training"}
        tensors = {**module._parameters, **module._buffers}
        yield from self.lines((state, tensors, dict(module.named_children())))


def _own_modules(patcher: ModelPatcher) -> set[int]:
    """The ids of the model's own modules, whether or not it is loaded with the patcher's objects in their places."""
    put = {id(part) for part in patcher.object_patches.values()}
    own: set[int] = set()
    modules = [patcher.model, *patcher.object_patches_backup.values()]
    while modules:
        module = modules.pop()
        if isinstance(module, torch.nn.Module) and id(module) not in own and id(module) not in put:
            own.add(id(module))
            modules.extend(module.children())
    return own


def _state(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    state = getattr(value, "__dict__", None) or {name: getattr(value, name, None) for name in slots}
    return {name: part for name, part in state.items() if name not in getattr(value, "RUN_STATE", ())}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _code(code: types.CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        elif not isinstance(constant, frozenset):  # their order differs between sessions
            yield repr(constant).encode()


def _tensor(tensor: torch.Tensor | np.ndarray) -> Iterator[bytes]:
    yield f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}".encode()
    if isinstance(tensor, np.ndarray):
        yield tensor.tobytes()
    elif type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
        stored = tensor.detach().cpu().contiguous().reshape(-1)
        yield hashlib.blake2b(stored.view(torch.uint8).numpy()).digest()
    else:
        yield from _Reader(None).lines(vars(tensor))
