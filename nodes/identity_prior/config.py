"""Settings of the identity prior and the non-rigid edit. Defaults name their source: LIPE (arXiv 2406.17236), or
"ours". The publication's code, layers, resolution and thresholds are not known to us.
"""

from dataclasses import dataclass

from ..inputs.ranges import ALL, check_choice, check_limits, check_range, parse_numbers

AUGMENTS = ("none", "crop", "crop_and_flip")
METHODS = ("ddim", "fixed_point", "renoise")
INVERSION, FLOW_EDIT = PATHS = ("inversion", "flow_edit")
AUTO = "auto"
FRACTION, OTSU, MEAN_STD, QUANTILE = THRESHOLDS = ("fraction", "otsu", "mean_std", "quantile")


@dataclass(frozen=True)
class IdentityPriorConfig:
    """Training of a prior: an attention-only LoRA on 3 to 5 captioned pictures, beside pictures of the class."""

    # Ours, by measurement on the theatre; the publication's number is not known to us.
    steps: int = 800
    learning_rate: float = 1e-3
    rank: int = 8
    # Published: a loss on the class beside that on the subject. The weight 1 is DreamBooth's (arXiv 2208.12242).
    prior_weight: float = 1.0
    # Ours: mirroring a text or an emblem changes the identity, so it has to be asked for.
    augment: str = "none"
    # Ours: how many pictures of the class the base model draws where none are connected.
    class_count: int = 8
    # Ours: what members of the class do in those pictures, so that they are not those of the subject once more; the
    # paper's set is diverse, but not known to us. Words of the theatre, too. Empty: the subject's captions.
    class_actions: str = "standing, waving, jumping, sitting, running, dancing, bowing, pointing"

    def __post_init__(self) -> None:
        check_choice(self, augment=AUGMENTS)
        check_limits(self, "prior_weight", lowest=0, fix="0 (off) or more, 1 is usual")
        check_limits(self, "class_count", lowest=1, fix="1 or more, or set prior_weight to 0")


@dataclass(frozen=True)
class MaskConfig:
    """From the cross-attention to the subject's tokens to a mask. Raises ValueError, naming the field."""

    # Ours, as a fraction of the map's range: of those tried on the theatre it overlaps best with the true masks, by
    # 0.63 at the source and 0.50 at the edit.
    threshold: float = 0.25
    # Ours, in latent cells: the model needs room around the subject.
    grow: int = 1
    # Ours: "auto" is five layers, of a UNet's coarsest that have 16 cells, of the middle third of a transformer's.
    layers: str = AUTO
    # Cells on the longer side at which layers are averaged; 0 is the finest layer's.
    resolution: int = 0
    # Ours, in cells of that resolution: the standard deviation of a Gaussian. Chosen as the threshold was.
    smoothing: float = 1.0
    # How `threshold` is read: as a fraction of the map's range, not at all (Otsu, 1979), as t / (1 - t) standard
    # deviations above the mean, or as the share of the cells that is left out. All but the first are further choices.
    threshold_method: str = FRACTION

    def __post_init__(self) -> None:
        check_choice(self, threshold_method=THRESHOLDS)
        check_limits(self, "threshold", lowest=0, highest=1, fix="0 (everything) to 1 (only the strongest cell)")
        check_limits(self, "grow", "resolution", "smoothing", lowest=0, fix="0 or more")
        parse_numbers("layers", self.layers, (AUTO, ALL))


@dataclass(frozen=True)
class InversionConfig:
    """From a picture to its path over the sigmas."""

    # Ours: exact for Euler and DDIM, once converged.
    method: str = "fixed_point"
    iterations: int = 4
    # LIPE inverts. FlowEdit (arXiv 2412.08629) goes straight from the picture to noise, which `seed` draws, and adds
    # to each step of the edit what the model's own estimate of the picture lacks.
    path: str = INVERSION
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, method=METHODS, path=PATHS)
        check_limits(self, "iterations", lowest=1, fix="1 or more")


@dataclass(frozen=True)
class BlendConfig:
    """Where in the schedule the blend acts. Published: every step."""

    start_percent: float = 0.0
    end_percent: float = 1.0
    # Ours: the share of new noise where the subject is. The inverted noise holds its old pose.
    fresh_noise: float = 0.0

    def __post_init__(self) -> None:
        check_range("the range of steps", start_percent=self.start_percent, end_percent=self.end_percent)
        check_limits(self, "fresh_noise", lowest=0, highest=1, fix="0 (the inverted noise) to 1 (all new)")
