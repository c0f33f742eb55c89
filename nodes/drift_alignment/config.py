"""Settings of drift alignment. The idea is VAE-LFA's (arXiv 2605.08250); every value here is ours."""

from dataclasses import dataclass

from ...kernels.spectral_guidance import HIGHEST_CUTOFF
from ..inputs.ranges import check_limits


@dataclass(frozen=True)
class DriftAlignmentConfig:
    """`cutoff` in cycles per latent pixel, included; `momentum` and `strength` are shares, 0..1.

    Raises ValueError, naming the setting, for values outside.
    """

    # Ours.
    cutoff: float = 0.25
    # Ours: the first round counts most.
    momentum: float = 0.9
    # Ours: all the way.
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_limits(self, "cutoff", lowest=0.0, highest=HIGHEST_CUTOFF, fix=f"0 to {HIGHEST_CUTOFF}")
        check_limits(self, "momentum", "strength", lowest=0.0, highest=1.0, fix="0 to 1.0")

    @property
    def off(self) -> bool:
        """True where alignment changes nothing."""
        return self.strength == 0
