"""Settings of frequency guidance. Defaults name their source: ImPoster (arXiv 2409.15650), or "ours"."""

from dataclasses import dataclass

from ...kernels.spectral_guidance import DISTANCES, HIGHEST_CUTOFF, RULES
from ..inputs.ranges import check_choice, check_limits, check_range

APPLY_TO = ("denoised", "latent")
MOST_DETAIL_BANDS = 4


@dataclass(frozen=True)
class FrequencyGuidanceConfig:
    """Scales are fractions of the whole way per step (0 off, 1 all the way), percents run 0..1 over sampling,
    cutoffs are in cycles per latent pixel, both included. Raises ValueError for ranges that hold nothing.
    """

    # Ours: a small pull; on the puppet theatre the amplitude term adds little to the phase term.
    amplitude_scale: float = 0.1
    # Ours: all the way, in low bands and early steps; all bands in every step bring the driving subject as well.
    phase_scale: float = 1.0
    # Ours: the published |angle| ("paper") cannot tell a picture from its 180 degree rotation.
    phase_distance: str = "circular"
    # Ours: the estimate, which stays right for multistep samplers and flow models. Published: the latent.
    apply_to: str = "denoised"
    start_percent: float = 0.0
    # Ours, with the low band. Published: every step (the last one of 50 excepted).
    end_percent: float = 0.4
    # Ours: each frequency by a share of its distance, so that 1 is all the way. Published: the plain gradient.
    update: str = "per_bin"
    # Ours: low frequencies carry the pose. Published: all bands.
    phase_low: float = 0.0
    phase_high: float = 0.3
    amplitude_low: float = 0.0
    amplitude_high: float = HIGHEST_CUTOFF
    # Ours, after FreqEdit (arXiv 2512.01755): how many of the finest wavelet bands follow the source.
    detail_bands: int = 0

    def __post_init__(self) -> None:
        check_choice(self, phase_distance=DISTANCES, apply_to=APPLY_TO, update=RULES)
        check_limits(self, "amplitude_scale", "phase_scale", lowest=0, highest=1, fix="0 (off) to 1 (all the way)")
        check_limits(self, "detail_bands", lowest=0, highest=MOST_DETAIL_BANDS, fix="0 (off) to 4")
        for low, high, what in (
            ("start_percent", "end_percent", "the range of steps"),
            ("phase_low", "phase_high", "the phase band"),
            ("amplitude_low", "amplitude_high", "the amplitude band"),
        ):
            check_range(what, **{low: getattr(self, low), high: getattr(self, high)})

    @property
    def off(self) -> bool:
        """True where guidance changes nothing."""
        return self.amplitude_scale == 0 and self.phase_scale == 0 and self.detail_bands == 0


@dataclass(frozen=True)
class SourceDrivingPairConfig:
    """Fine-tuning on the two pictures: `steps` iterations, each one step on the source and one on the driving one."""

    # Published: 500 iterations.
    steps: int = 500
    # Ours, for a LoRA alone. On the theatre 3e-3 did best of four in 60 steps; 500 steps were not measured.
    learning_rate: float = 1e-3
    # Published, for the whole UNet.
    whole_unet_learning_rate: float = 2e-6
    # Published: rank 4.
    rank: int = 4


# Ours: a higher rate is taken for that of a LoRA, left from an earlier run.
HIGHEST_WHOLE_UNET_LEARNING_RATE = 5e-4
