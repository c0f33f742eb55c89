"""Pickle streams as plain data: no class that a stream names is imported, and nothing in it is called.

A pickle is a program for a stack machine. This one knows containers, text, numbers and the tensors of torch.save. An
object of any other class, such as the settings that a training script stores beside its weights, becomes an Unknown.
"""

import pickletools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import shown_by_name

MAX_STEPS = 1 << 20  # bounds time and memory; a large checkpoint with its optimizer's states has some 200,000

# What is data in the standard library; anything else of it is refused, and so are the functions of other libraries.
_DATA_MODULES = {"collections", "typing", "pathlib", "datetime", "enum", "decimal", "fractions", "uuid", "numbers"}
_DATA = {
    "argparse.Namespace", "types.SimpleNamespace", "types.GenericAlias", "types.MappingProxyType", "types.NoneType",
    "functools.partial", "functools.reduce", "operator.getitem", "operator.or_", "_codecs.encode",
    "copyreg._reconstructor", "copyreg.__newobj__", "torch.device", "torch.serialization._get_layout",
    "torch._tensor._rebuild_from_type_v2", "torch.storage._load_from_bytes",
    *(f"builtins.{name}" for name in (
        "object", "type", "dict", "list", "set", "frozenset", "tuple", "int", "float", "bool", "str", "bytes",
        "bytearray", "complex", "slice", "range", "xrange", "long", "unicode", "reduce",
    )),
}
_NUMPY_DATA = {"scalar", "dtype", "ndarray", "_reconstruct", "_frombuffer", "__bit_generator_ctor",
               "__generator_ctor", "__randomstate_ctor"}
# Python 2's, which pickles of protocol 2 still write, and those that C code is imported as.
_MODULES = {
    "__builtin__": "builtins", "copy_reg": "copyreg", "_operator": "operator", "_functools": "functools",
}
_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_REBUILD = "torch._utils._rebuild_"
_WRAPPED = {f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state", "torch.nn.parameter.Parameter"}

_PUSHED = {
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BYTEARRAY8",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@shown_by_name
class UnsafePickleError(ValueError):
    """The stream asks for what could run code; the message is its name."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a stream names, by module and name. It is not looked up."""

    path: str


class Unknown(dict):
    """An object of a class that is not read, with the items that were put into it, and the `state` of its fields."""

    __slots__ = ("path", "state")

    def __init__(self, path: str):
        self.path, self.state = path, None


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a file stores numbers: under which key, of which type, and how many."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor before its numbers are read; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(stream: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """What the pickle at the stream's position describes, and the storages that it refers to, by key.

    The stream is read up to the pickle's end. Raises UnsafePickleError where it asks for a function or for a part of
    the standard library that is not data; ValueError, LookupError, TypeError, AttributeError or OverflowError where
    it is damaged.
    """
    machine = _Machine()
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step >= MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.storages


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.copied = 0

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _PUSHED:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
            items = self._marked() if opcode == "INST" else None
            named = _named(module, name)
            stack.append(named if items is None else self._made(named, items))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            method = getattr(self, f"_{opcode.lower()}", None)
            if method is None:
                raise ValueError(f"it uses {opcode}")
            method()

    def _marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _mark(self):
        self.marks.append(len(self.stack))

    def _pop(self):
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self):
        self._marked()

    def _dup(self):
        self.stack.append(self.stack[-1])

    def _memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def _tuple(self):
        self.stack.append(tuple(self._marked()))

    def _list(self):
        self.stack.append(self._marked())

    def _empty_list(self):
        self.stack.append([])

    def _empty_dict(self):
        self.stack.append({})

    def _dict(self):
        items = self._marked()
        self.stack.append({})
        self._put(items)

    def _empty_set(self):
        self.stack.append(Unknown("builtins.set"))

    def _frozenset(self):
        self._marked()
        self.stack.append(Unknown("builtins.frozenset"))

    def _additems(self):
        self._marked()

    def _append(self):
        self._extend([self.stack.pop()])

    def _appends(self):
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _setitems(self):
        self._put(self._marked())

    def _put(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No other keys name weights, and hashes of nested or crafted ones take unbounded time.
            if type(key) is str or (type(key) is int and abs(key) < 1 << 60):
                target[key] = value

    def _stack_global(self):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_named(module, name))

    def _reduce(self):
        arguments, callee = self.stack.pop(), self.stack.pop()
        self.stack.append(self._made(callee, arguments))

    _newobj = _reduce

    def _newobj_ex(self):
        self.stack.pop()  # arguments by name
        self._reduce()

    def _obj(self):
        callee, *arguments = self._marked()
        self.stack.append(self._made(callee, arguments))

    def _build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Unknown):
            self.stack[-1].state = state  # not copied, since a stream may do so with one state many times

    def _binpersid(self):
        kind, *described = self.stack.pop()
        if kind == "module":
            self.stack.append(described[0])
            return
        named, key, _, count = described[:4]
        dtype = _STORAGES[named.path.rpartition(".")[2].lstrip("_")]
        if kind != "storage" or described[4:] not in ([], [None]) or type(count) is not int or count < 0:
            raise ValueError("it refers to something other than a storage")
        storage = Storage(str(key), dtype, count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"it describes storage {str(key)[:20]!r} twice")
        self.stack.append(storage)

    def _made(self, callee: Name, arguments: Sequence[Any]) -> Any:
        """What a call would give, without the call."""
        path = callee.path
        if path in _DICTIONARIES:
            self.stack.append({})
            pairs = next((part for part in arguments if isinstance(part, list | dict)), [])
            self.copied += len(pairs)
            if self.copied > MAX_STEPS:
                raise ValueError("it copies too many items")
            pairs = pairs.items() if isinstance(pairs, dict) else pairs
            self._put([part for pair in pairs for part in pair])
            return self.stack.pop()
        if path == "torch.Size":
            return arguments[0]
        if path in _WRAPPED:
            return arguments[0]
        if path == "torch._tensor._rebuild_from_type_v2":
            return self._made(arguments[0], arguments[2])
        if path in (f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            return StoredTensor(storage, storage.dtype, offset, shape, strides)
        if path == f"{_REBUILD}tensor_v3":
            storage, offset, shape, strides, _, _, dtype = arguments[:7]
            return StoredTensor(storage, _DTYPES[dtype.path], offset, shape, strides)
        if path in ("copyreg._reconstructor", "copyreg.__newobj__"):
            return Unknown(arguments[0].path)
        return Unknown(path)


def _named(module: str, name: str) -> Name:
    """The name, if it can be one of data. Raises UnsafePickleError for others."""
    module = _MODULES.get(module, module)
    path = f"{module}.{name}"
    root, last = module.partition(".")[0], name.rpartition(".")[2]
    data = (
        path in _DATA or root in _DATA_MODULES or path in _DTYPES or path.startswith(_REBUILD)
        or (root == "numpy" and (name in _NUMPY_DATA or name.startswith("__pyx_unpickle_")))
    )
    # A path through a module reaches what it imports: `torch.hub` has `os.system`.
    through = not sys.stdlib_module_names.isdisjoint(name.split("."))
    if not data and (root in sys.stdlib_module_names or through or not last.lstrip("_")[:1].isupper()):
        raise UnsafePickleError(path)
    return Name(path)
