"""How the pack's exceptions stand before their messages in the browser."""

import pack.nodes.extension  # noqa: F401  defines them all
from pack.nodes.files.names import WeightFileError


def test_the_host_shows_them_by_name_alone():
    def below(error):
        return [error, *(found for child in error.__subclasses__() for found in below(child))]

    assert [error for error in below(Exception) if error.__module__.startswith("pack.")] == []
    assert (WeightFileError.__module__, WeightFileError.__qualname__) == ("builtins", "WeightFileError")
