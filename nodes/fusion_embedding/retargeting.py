"""Body proportions of one skeleton on the pose of another, on OpenPose-18 keypoints; all of it is ours.

Keypoints are the host's POSE_KEYPOINT: a list of frames with canvas_width, canvas_height and people, each with flat
lists [x, y, score, ...] in pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from .config import RetargetConfig
from .layout import FusionError

BODY = "pose_keypoints_2d"
POINTS = 18
_NECK, _ANKLES = 1, (10, 13)
# (from, to, class): a tree from the neck outward; both sides of a class share a length.
_LIMBS = (
    (1, 0, "neck"), (1, 2, "shoulder"), (1, 5, "shoulder"), (1, 8, "torso"), (1, 11, "torso"),
    (2, 3, "upper arm"), (5, 6, "upper arm"), (3, 4, "forearm"), (6, 7, "forearm"),
    (8, 9, "thigh"), (11, 12, "thigh"), (9, 10, "shin"), (12, 13, "shin"),
    (0, 14, "eye"), (0, 15, "eye"), (14, 16, "ear"), (15, 17, "ear"),
)
# Other points move with the nearest of these joints.
_ATTACHED = {
    "hand_right_keypoints_2d": (4,), "hand_left_keypoints_2d": (7,), "face_keypoints_2d": (0,),
    "foot_keypoints_2d": _ANKLES,
}


def retarget(pose: Sequence[dict], source: Sequence[dict], config: RetargetConfig) -> list[dict]:
    """The people of every frame of `pose` with the body proportions of the first person found in `source`.

    Directions of limbs, the length of the torso and the height of the lower foot stay the pose's. A length is the
    longest that its class has over all frames and both sides, since a limb that points at the camera looks short.
    Raises FusionError, naming the input, where nobody is found. The given keypoints stay as they are.
    """
    wanted = _lengths(source, config, "source_keypoints")
    given = _lengths(pose, config, "keypoints")
    factors = {
        name: _factor(wanted[name] / wanted["torso"], given[name] / given["torso"], config)
        for name in given if name in wanted
    }
    frames = copy.deepcopy(list(pose))
    for frame in frames:
        for person in _people(frame):
            _move(person, factors, config)
    return frames


def _factor(wanted: float, given: float, config: RetargetConfig) -> float:
    factor = min(max(wanted / given, 1 / config.largest_factor), config.largest_factor)
    return factor**config.amount


def _lengths(frames: Sequence[dict], config: RetargetConfig, name: str) -> dict[str, float]:
    """The longest limb of each class, in pixels."""
    longest: dict[str, float] = {}
    for frame in frames:
        for person in _people(frame)[:1]:
            points = _points(person, name)
            for a, b, limb in _LIMBS:
                if _found(points, a, config) and _found(points, b, config):
                    length = math.dist(points[a][:2], points[b][:2])
                    longest[limb] = max(longest.get(limb, 0.0), length)
    if not longest.get("torso"):
        raise FusionError(
            f"{name} hold no person with a neck and a hip: connect SDPose Keypoint Extractor on a picture that shows "
            "the body, or lower score_threshold"
        )
    return {limb: length for limb, length in longest.items() if length > 0}


def _people(frame: dict) -> list[dict]:
    """Those of whom a body was found, if only a part; detectors list hands and faces of others, too."""
    return [person for person in frame.get("people") or [] if person.get(BODY)]


def _points(person: dict, name: str) -> list[list[float]]:
    flat = person[BODY]
    if len(flat) != 3 * POINTS:
        raise FusionError(f"{name} have {len(flat) // 3} points of a body, where OpenPose has {POINTS}")
    return [[float(value) for value in flat[3 * i : 3 * i + 3]] for i in range(POINTS)]


def _found(points: list[list[float]], index: int, config: RetargetConfig) -> bool:
    return points[index][2] >= config.score_threshold


def _move(person: dict, factors: dict[str, float], config: RetargetConfig) -> None:
    """Stretch one person in place, from the neck outward, then put the feet back on the ground."""
    before = _points(person, "keypoints")
    if not _found(before, _NECK, config):
        return
    after = copy.deepcopy(before)
    for a, b, limb in _LIMBS:
        # A joint that was not found still moves with the one before it.
        factor = factors.get(limb, 1.0) if _found(before, a, config) and _found(before, b, config) else 1.0
        for axis in range(2):
            after[b][axis] = after[a][axis] + factor * (before[b][axis] - before[a][axis])
    feet = [i for i in _ANKLES if _found(before, i, config)]
    if feet:
        sunk = max(after[i][1] for i in feet) - max(before[i][1] for i in feet)
        for point in after:
            point[1] -= sunk
    person[BODY] = [value for point in after for value in point]
    for key, joints in _ATTACHED.items():
        if person.get(key):
            person[key] = _carried(list(person[key]), joints, before, after)


def _carried(flat: list[float], joints: Sequence[int], before: list, after: list) -> list[float]:
    """Points that keep their place beside the nearest of some joints."""
    for i in range(0, len(flat) - 2, 3):
        near = min(joints, key=lambda joint: math.dist(flat[i : i + 2], before[joint][:2]))
        for axis in range(2):
            flat[i + axis] += after[near][axis] - before[near][axis]
    return flat
