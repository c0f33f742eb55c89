"""The names under which ComfyUI shows the pack's exceptions."""

from typing import TypeVar

Error = TypeVar("Error", bound=type[Exception])


def shown_by_name(error: Error) -> Error:
    """An exception class that ComfyUI shows by its name alone, without the module, as it does for builtin ones."""
    error.__module__ = "builtins"
    return error
