"""Ranges as nodes take them: limits of settings, a part of the schedule in percent, numbers such as `0-19, 25`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .words import DASH, SEPARATORS

# Schedulers, percents and samplers round one sigma differently in fp32, measured below 1e-6 of it; a sigma so near a
# limit counts as on it. Schedules also have steps of their own within 1e-4 of a limit, so it is not wider than this.
SIGMA_TOLERANCE = 1e-5

ALL = "all"
_NUMBERS = re.compile(rf"(\d{{1,4}})(?:\s*{DASH}\s*(\d{{1,4}}))?")


def check_choice(config: Any, **options: Sequence[str]) -> None:
    """Raises ValueError, naming it, where a setting is not among its options."""
    for name, allowed in options.items():
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")


def check_limits(config: Any, *names: str, lowest: float, highest: float = math.inf, fix: str) -> None:
    """Raises ValueError, naming it, where one of these settings is outside, with `fix` as what to use."""
    for name in names:
        if not lowest <= (value := getattr(config, name)) <= highest:
            raise ValueError(f"{name} is {value}: use {fix}")


def check_range(what: str, **limits: float) -> None:
    """Raises ValueError, naming both, where the first of two limits is not below the second."""
    (low, low_value), (high, high_value) = limits.items()
    if not low_value < high_value:
        raise ValueError(f"{what} is empty: set {low} ({low_value}) below {high} ({high_value})")


@dataclass(frozen=True)
class SigmaRange:
    """The sigmas with start >= sigma > end, so that a step on a limit belongs to the range that starts there."""

    start: float
    end: float

    def __contains__(self, sigma: float) -> bool:
        return self.start >= sigma > self.end


def sigma_range(model_sampling: Any, start_percent: float, end_percent: float) -> SigmaRange:
    """The sigmas of a part of the schedule, 0..1, whatever the rounding of its steps."""
    start, end = (model_sampling.percent_to_sigma(percent) for percent in (start_percent, end_percent))
    return SigmaRange(start * (1 + SIGMA_TOLERANCE), end * (1 + SIGMA_TOLERANCE))


def parse_numbers(name: str, text: str, words: Sequence[str] = (ALL,)) -> frozenset[int] | None:
    """The numbers in text such as `4-6, 9`; None for one of `words`, in any case.

    Raises ValueError, naming the input, for any other text.
    """
    if text.strip().lower() in words:
        return None
    numbers: set[int] = set()
    for part in SEPARATORS.split(text.strip()):
        match = _NUMBERS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            listed = ", ".join(map(repr, words))
            raise ValueError(f"{name} is {text!r}: use {listed}, or numbers and ranges such as '4-6, 9'")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def select_numbers(name: str, text: str, count: int) -> frozenset[int]:
    """Those from 0 to `count` - 1 that the text names, or `all`. Raises ValueError, naming the input, for others."""
    numbers = parse_numbers(name, text)
    if numbers is None:
        return frozenset(range(count))
    if max(numbers) >= count:
        raise ValueError(f"{name} is {text!r} and this model has 0 to {count - 1}: choose among those")
    return numbers
