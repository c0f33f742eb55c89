"""The base of every node: what `execute` is given is checked against the node's own schema before anything runs.

ComfyUI checks what is typed; numbers that come through links or from an API, and NaN, reach a node as they are.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from comfy_api.latest import io

_LISTED = 12  # options that an error names


class File(io.Combo.Input):
    """A choice among files: what reads it finds it, since files come and go after they were listed."""


class CheckedNode(io.ComfyNode):
    """A node whose `execute` sees only what its schema allows; it raises ValueError, naming the input, for others."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        execute = cls.__dict__.get("execute")
        if execute is not None and not hasattr(execute.__func__, "__wrapped__"):  # ComfyUI copies classes
            cls.execute = classmethod(_checked(execute.__func__))


def _checked(execute: Callable) -> Callable:
    names = list(inspect.signature(execute).parameters)[1:]

    @functools.wraps(execute)
    def checked(cls, *args, **kwargs):
        schema = cls.define_schema()
        return execute(cls, **allowed(schema, {**dict(zip(names, args, strict=False)), **kwargs}))

    return checked


def allowed(schema: io.Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node's inputs, whole numbers as int. An optional one that is None counts as not connected.

    Raises ValueError, naming the input, what was found and what to do, for a value that the schema does not allow.
    """
    checked = dict(values)
    for widget in schema.inputs:
        check = next((check for kind, check in _CHECKS.items() if isinstance(widget, kind)), None)
        if check is None or widget.id not in values:
            continue
        value = values[widget.id]
        several = schema.is_input_list and isinstance(value, list | tuple)
        parts = list(value) if several else [value]
        if widget.optional and all(part is None for part in parts):
            del checked[widget.id]
        elif not parts:
            raise ValueError(f"{widget.id} is an empty list: connect at least one value")
        else:
            parts = [check(widget, part) for part in parts]
            checked[widget.id] = parts if several else parts[0]
    return checked


def _integer(widget: io.Int.Input, value: Any) -> int:
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    if not whole or _is_boolean(value):
        raise _refused(widget, value, f"use a whole number{_limits(widget, ', ')}")
    _check_limits(widget, value)
    return int(value)


def _number(widget: io.Float.Input, value: Any) -> float:
    finite = isinstance(value, numbers.Real) and (isinstance(value, numbers.Integral) or math.isfinite(value))
    if not finite or _is_boolean(value):
        raise _refused(widget, value, f"use a number{_limits(widget, ', ')}")
    _check_limits(widget, value)
    return value


def _option(widget: io.Combo.Input, value: Any) -> Any:
    options = list(widget.options)
    if value not in options:
        raise _refused(widget, value, f"use one of {_names(options)}")
    return value


def _options(widget: io.MultiCombo.Input, value: Any) -> list:
    if isinstance(value, str):  # of an API
        value = [value]
    if not isinstance(value, list | tuple):
        raise _refused(widget, value, f"use a list of {_names(widget.options)}")
    return [_option(widget, part) for part in value]


def _text(widget: Any, value: Any) -> str:
    if not isinstance(value, str):
        raise _refused(widget, value, "connect a text")
    return value


def _file(widget: File, value: Any) -> str:
    if not isinstance(value, str):
        raise _refused(widget, value, "choose one of the list")
    return value


def _boolean(widget: io.Boolean.Input, value: Any) -> bool:
    if not _is_boolean(value):
        raise _refused(widget, value, "use true or false")
    return bool(value)


# The first that fits; other types are for the node.
_CHECKS = {
    File: _file, io.Int.Input: _integer, io.Float.Input: _number, io.MultiCombo.Input: _options,
    io.Combo.Input: _option, io.String.Input: _text, io.Boolean.Input: _boolean,
}


def _check_limits(widget: Any, value: float) -> None:
    if (widget.min is not None and value < widget.min) or (widget.max is not None and value > widget.max):
        raise _refused(widget, value, f"use{_limits(widget, ' ') or ' another number'}")


def _limits(widget: Any, before: str) -> str:
    if widget.min is None or widget.max is None:
        return ""
    low, high = (f"{limit:g}" if isinstance(limit, float) else limit for limit in (widget.min, widget.max))
    return f"{before}{low} to {high}"


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _names(options: Sequence[Any]) -> str:
    return ", ".join(map(str, options[:_LISTED])) + (", …" if len(options) > _LISTED else "")


def _refused(widget: Any, value: Any, fix: str) -> ValueError:
    shown = repr(value) if isinstance(value, str | numbers.Number | None) else f"of type {type(value).__name__}"
    return ValueError(f"{widget.id} is {shown[:80]}: {fix}")
