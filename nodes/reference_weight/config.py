"""Settings of Reference Weight. The method is ours; a weight on attention's columns is common knowledge."""

from dataclasses import dataclass

from ..inputs.ranges import ALL, check_limits, check_range, parse_numbers

HIGHEST_STRENGTH = 4.0


@dataclass(frozen=True)
class ReferenceWeightConfig:
    """Which reference weighs how much: `reference` counts from 1 and 0 is all of them, strength 0..4, steps as
    percents 0..1 of sampling, blocks counted from 0.

    Raises ValueError for a value out of range, an empty range of steps, or other text than block ranges.
    """

    # Ours, as everything here: 1 is the plain model.
    reference: int = 0
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    blocks: str = ALL

    def __post_init__(self) -> None:
        check_limits(self, "reference", lowest=0, fix="0 (all of them), or the number of one, from 1")
        fix = f"0 (as if it were not there) to {HIGHEST_STRENGTH:g}, 1 is the plain model"
        check_limits(self, "strength", lowest=0, highest=HIGHEST_STRENGTH, fix=fix)
        check_range("the range of steps", start_percent=self.start_percent, end_percent=self.end_percent)
        parse_numbers("blocks", self.blocks)
