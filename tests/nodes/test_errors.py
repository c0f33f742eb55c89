"""The names under which ComfyUI shows the pack's exceptions."""

import pack.nodes.extension  # noqa: F401  defines them all
from pack.nodes.files.names import WeightFileError


def test_comfyui_shows_them_by_name_alone():
    def below(error):
        return [error, *(subclass for child in error.__subclasses__() for subclass in below(child))]

    assert [error for error in below(Exception) if error.__module__.startswith("pack.")] == []
    assert (WeightFileError.__module__, WeightFileError.__qualname__) == ("builtins", "WeightFileError")
