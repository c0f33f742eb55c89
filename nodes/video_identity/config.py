"""Settings of the video identity adapter. Defaults name their source: Stand-In (arXiv 2508.07901), or "ours"."""

from dataclasses import dataclass

from ..inputs.ranges import ALL, check_choice, check_limits, check_range, parse_numbers

HIGHEST_STRENGTH = 2.0  # ours: twice as much of the attention, before the softmax divides
HIGHEST_GUIDANCE = 10.0  # ours: as far as CFG is turned up


@dataclass(frozen=True)
class VideoIdentityConfig:
    """How the video sees a reference: strength 0..2, steps as percents 0..1 of sampling, blocks counted from 0,
    and how far a third branch of guidance goes, 0 (off) to 10.

    Raises ValueError for a strength or guidance out of range, an empty range of steps, or other text than blocks.
    """

    # Published: the reference's tokens are keys like any other.
    strength: float = 1.0
    # Published: every step.
    start_percent: float = 0.0
    end_percent: float = 1.0
    # Published: every block.
    blocks: str = ALL
    # Published: no branch of its own. After ST-DRC (arXiv 2606.02441); see guidance.py.
    reference_guidance: float = 0.0

    def __post_init__(self) -> None:
        fix = f"0 (off) to {HIGHEST_STRENGTH:g}, 1 is as published"
        check_limits(self, "strength", lowest=0, highest=HIGHEST_STRENGTH, fix=fix)
        fix = f"0 (off) to {HIGHEST_GUIDANCE:g}"
        check_limits(self, "reference_guidance", lowest=0, highest=HIGHEST_GUIDANCE, fix=fix)
        check_range("the range of steps", start_percent=self.start_percent, end_percent=self.end_percent)
        parse_numbers("blocks", self.blocks)

    @property
    def every_step(self) -> bool:
        """True where the percents leave out no step."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0


@dataclass(frozen=True)
class ReferenceConfig:
    """The picture of the person: a square crop around the face; size in pixels, crop_factor in sides of its box."""

    # Published: 512 x 512, so 64 x 64 latent cells and 1,024 tokens.
    size: int = 512
    # Published: the longer side of the face's box, half as long again.
    crop_factor: float = 1.5

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size is {self.size}: use a multiple of 16 pixels, which is one token")
        check_limits(self, "crop_factor", lowest=1, highest=10, fix="1 (the box itself) to 10")


BELL, EVEN = LOSS_WEIGHTINGS = ("bell", "even")


@dataclass(frozen=True)
class AdapterTrainingConfig:
    """Training of the updates of the reference's q, k and v."""

    # Published: 3,000 steps of 48 videos; one per step is ours, for one machine.
    steps: int = 3000
    batch_size: int = 1
    # Published: rank 128, without an alpha / rank factor.
    rank: int = 128
    # Ours: the publication states none.
    learning_rate: float = 1e-4
    # That of the authors' repository, which inherits it: noise levels of shift 5 under a bell. "even" is ours: the
    # model's own levels alike. With Wan's shift of 8 half of them are so high that looks are already decided.
    loss_weighting: str = BELL

    def __post_init__(self) -> None:
        check_choice(self, loss_weighting=LOSS_WEIGHTINGS)
