"""How the pack's own exceptions are called where the host shows them."""

from typing import TypeVar

Error = TypeVar("Error", bound=type[Exception])


def shown_by_name(error: Error) -> Error:
    """An exception class that the host announces by its name alone, as it does builtin ones, without the module."""
    error.__module__ = "builtins"
    return error
