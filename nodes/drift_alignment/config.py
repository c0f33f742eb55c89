"""Settings of drift alignment. The idea is VAE-LFA's (arXiv 2605.08250); every value here is ours."""

from __future__ import annotations

from dataclasses import dataclass

# The highest frequency of a plane is sqrt(1/2) cycles per pixel: a cutoff from here on lets everything pass.
HIGHEST_CUTOFF = 0.75


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
        for name, highest in (("cutoff", HIGHEST_CUTOFF), ("momentum", 1.0), ("strength", 1.0)):
            value = getattr(self, name)
            if not 0.0 <= value <= highest:
                raise ValueError(f"{name} is {value}: use 0 to {highest}")

    @property
    def off(self) -> bool:
        """True where alignment changes nothing."""
        return self.strength == 0
