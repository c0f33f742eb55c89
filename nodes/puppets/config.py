"""Names, colours and frozen dataclasses of the puppet world. Every tuple's order is part of the format."""

import functools
from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]  # components in 0..1

SPECIES = ("person", "cat", "robot", "bear", "rabbit", "frog", "fox", "penguin")
PATTERNS = ("plain", "striped", "dotted", "checked")
HEADWEAR = ("none", "cap", "beanie", "top hat", "crown")
# What a picture shows of the puppet: all of it, or head and shoulders, which fill the frame.
FRAMINGS = ("full", "close_up")


@dataclass(frozen=True)
class Action:
    """What there is to know of an action but its movement."""

    named: bool = True  # False: drawn in training pictures, never written in a caption
    framings: tuple[str, ...] = ("full",)
    sided: bool = False  # goes to one side of the picture, so that "left" and "right" are visible
    arms_behind: bool = False  # its arms pass behind the head rather than before it


# Every action, once. The order within each kind is part of the format. An unnamed one is what a method has to
# learn from a reference.
ACTION_TABLE: dict[str, Action] = {
    "standing": Action(),
    "waving": Action(framings=FRAMINGS),
    "cheering": Action(framings=FRAMINGS, arms_behind=True),
    "jumping": Action(arms_behind=True),
    "sitting": Action(sided=True),
    "kicking": Action(sided=True),
    "running": Action(sided=True),
    "dancing": Action(),
    "handstand": Action(arms_behind=True),
    "pointing": Action(framings=FRAMINGS, sided=True),
    "bowing": Action(sided=True),
    "crawling": Action(sided=True),
    "nodding": Action(framings=("close_up",)),
    "shaking head": Action(framings=("close_up",)),
    "raising hat": Action(framings=("close_up",)),  # without a hat, the gesture alone
    "turning": Action(framings=("close_up",), sided=True),
    "saluting": Action(named=False, framings=FRAMINGS),
    "lunging": Action(named=False),
    "starfish": Action(named=False),
    "hugging": Action(named=False, framings=FRAMINGS),
    "flexing": Action(named=False, framings=FRAMINGS),
    "balancing": Action(named=False, arms_behind=True),
    "akimbo": Action(named=False),
    "splits": Action(named=False),
}
ALL_ACTIONS = tuple(ACTION_TABLE)


@functools.cache
def actions_of(framing: str = "full", named: bool | None = None) -> tuple[str, ...]:
    """The actions that a framing has, those with a word first; `named` keeps one kind.

    Raises ValueError for an unknown framing.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"unknown framing {framing!r}: choose one of {', '.join(FRAMINGS)}")
    kinds = (True, False) if named is None else (named,)
    return tuple(action for kind in kinds for action, facts in ACTION_TABLE.items()
                 if facts.named == kind and framing in facts.framings)


def check_framing(action: str, framing: str) -> None:
    """Raises ValueError for an action that the framing does not have, or for an unknown one of either."""
    allowed = actions_of(framing)
    if action not in ACTION_TABLE:
        raise ValueError(f"unknown action {action!r}: choose one of {', '.join(ALL_ACTIONS)}")
    if action not in allowed:
        raise ValueError(f"{action!r} has no framing {framing!r}: choose one of {', '.join(allowed)}")


# Those of the full figure.
ACTIONS, NAMED_ACTIONS, UNNAMED_ACTIONS = actions_of(), actions_of(named=True), actions_of(named=False)
SIDED_ACTIONS = frozenset(action for action, facts in ACTION_TABLE.items() if facts.sided)
# Drawn, never written: "ear" folds an ear, bends an antenna, adds a ponytail or a tuft, by species.
DETAILS = ("none", "heart", "star", "bolt", "two_tone", "odd_trousers", "ear", "eye_patch", "scarf")
SCENES = ("beach", "forest", "city", "snow", "stage", "night")
SPLITS = ("train", "validation", "unseen")

# The label of a part in the part map is its position here. "ears" are also hair and antenna; "extras" are the
# tail and the scarf; left and right are the puppet's own.
PART_NAMES = (
    "background", "head", "face", "ears", "headwear", "torso", "right_arm", "left_arm",
    "right_hand", "left_hand", "right_leg", "left_leg", "feet", "extras",
)

# The colour that a light multiplies onto the whole picture, over that of the scene. Captions never name it.
LIGHTS: dict[str, RGB] = {
    "day": (1.0, 1.0, 1.0), "dusk": (1.0, 0.87, 0.76), "moon": (0.78, 0.86, 1.0), "dim": (0.80, 0.79, 0.78),
}
# (shift to the right, as a fraction of the frame; scale) of a view, by framing. Captions never name it.
VIEWS: dict[str, dict[str, tuple[float, float]]] = {
    "full": {"centre": (0.0, 1.0), "left": (-0.15, 1.0), "right": (0.15, 1.0), "far": (0.0, 0.80)},
    "close_up": {"centre": (0.0, 1.0), "left": (-0.08, 1.0), "right": (0.08, 1.0), "far": (0.0, 0.86)},
}
VIEW_NAMES = tuple(VIEWS["full"])

# COCO-18 in OpenPose order; left and right are the puppet's own.
JOINTS = (
    "nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist", "r_hip", "r_knee",
    "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear",
)
# The joint that each joint becomes in a mirror.
MIRROR = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)

# Cloth colours by name: a continuous colour is called by the nearest of these.
COLOURS: dict[str, RGB] = {
    "red": (0.85, 0.16, 0.16),
    "orange": (0.96, 0.53, 0.10),
    "yellow": (0.98, 0.83, 0.20),
    "green": (0.25, 0.62, 0.25),
    "teal": (0.10, 0.62, 0.62),
    "blue": (0.18, 0.35, 0.82),
    "purple": (0.50, 0.23, 0.68),
    "pink": (0.96, 0.55, 0.70),
    "brown": (0.48, 0.30, 0.17),
    "white": (0.95, 0.94, 0.91),
    "black": (0.16, 0.16, 0.19),
}

# The (fur or skin, accent) of a species; the accent is hair, muzzle, panel or beak. Captions never name them.
COATS: dict[str, tuple[tuple[RGB, RGB], ...]] = {
    "person": (
        ((0.96, 0.80, 0.67), (0.36, 0.22, 0.13)), ((0.62, 0.41, 0.27), (0.14, 0.11, 0.12)),
        ((0.91, 0.70, 0.52), (0.16, 0.13, 0.15)), ((0.98, 0.84, 0.74), (0.86, 0.62, 0.24)),
        ((0.45, 0.29, 0.20), (0.20, 0.12, 0.10)), ((0.97, 0.82, 0.72), (0.72, 0.30, 0.14)),
    ),
    "cat": (
        ((0.62, 0.62, 0.66), (0.93, 0.92, 0.92)), ((0.93, 0.66, 0.35), (0.99, 0.91, 0.80)),
        ((0.35, 0.33, 0.37), (0.80, 0.78, 0.80)), ((0.94, 0.89, 0.80), (0.99, 0.97, 0.93)),
    ),
    "robot": (
        ((0.72, 0.77, 0.82), (0.16, 0.22, 0.30)), ((0.56, 0.74, 0.80), (0.12, 0.20, 0.28)),
        ((0.85, 0.78, 0.62), (0.25, 0.20, 0.20)),
    ),
    "bear": (
        ((0.55, 0.37, 0.23), (0.88, 0.74, 0.55)), ((0.76, 0.55, 0.33), (0.96, 0.86, 0.68)),
        ((0.93, 0.91, 0.87), (0.99, 0.97, 0.93)),
    ),
    "rabbit": (
        ((0.95, 0.93, 0.91), (0.97, 0.74, 0.76)), ((0.78, 0.68, 0.58), (0.97, 0.84, 0.80)),
        ((0.68, 0.69, 0.73), (0.96, 0.78, 0.80)),
    ),
    "frog": (
        ((0.49, 0.75, 0.30), (0.82, 0.92, 0.58)), ((0.30, 0.62, 0.40), (0.72, 0.88, 0.62)),
        ((0.70, 0.76, 0.26), (0.92, 0.93, 0.62)),
    ),
    "fox": (
        ((0.90, 0.45, 0.16), (0.99, 0.95, 0.89)), ((0.78, 0.33, 0.16), (0.98, 0.91, 0.82)),
        ((0.88, 0.86, 0.86), (0.99, 0.98, 0.97)),
    ),
    "penguin": (
        ((0.19, 0.22, 0.30), (0.98, 0.65, 0.16)), ((0.25, 0.36, 0.52), (0.98, 0.72, 0.24)),
        ((0.40, 0.43, 0.48), (0.95, 0.56, 0.24)),
    ),
}

# The limbs of the standard OpenPose drawing and its colours, in joint order.
POSE_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)
POSE_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)


@dataclass(frozen=True)
class Identity:
    """Who a puppet is. `skin`, `accent`, `detail` and `detail_colour` have no words."""

    species: str
    skin: RGB
    accent: RGB
    shirt: RGB
    pattern: str
    pattern_colour: RGB
    trousers: RGB
    headwear: str
    headwear_colour: RGB
    detail: str = "none"
    detail_colour: RGB = (0.98, 0.83, 0.20)


@dataclass(frozen=True)
class Take:
    """One picture to draw: an identity, what it does, where, and how the camera sees it."""

    identity: Identity
    action: str
    phase: float = 0.0  # 0..1, the moment in the action's cycle
    mirrored: bool = False  # flips the action, not the identity
    scene: str = "stage"
    light: str = "day"
    view: str = "centre"
    dx: float = 0.0  # shift from where the view puts it, as a fraction of the frame
    dy: float = 0.0
    scale: float = 1.0  # times the view's
    seed: int = 0  # small angles of the joints, decoration of the scene
    framing: str = "full"

    def __post_init__(self):
        check_framing(self.action, self.framing)


@dataclass
class Picture:
    """A drawn take and everything that is known about it."""

    image: np.ndarray  # uint8 [H, W, 3]
    parts: np.ndarray  # uint8 [H, W], positions in PART_NAMES
    joints: np.ndarray  # float32 [18, 3]: x and y in pixels, 1 where inside the frame
    caption: str

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]: where the puppet is."""
        return self.parts > 0
