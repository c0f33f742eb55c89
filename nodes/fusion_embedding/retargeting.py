"""Body proportions of one skeleton on the pose of another: apart from method.py, since it is ours, not FPDM's.

Keypoints are ComfyUI's POSE_KEYPOINT, as inputs.keypoints reads them, with the 18 points of OpenPose.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from ..inputs import keypoints
from ..inputs.keypoints import BODY
from .config import RetargetConfig
from .layout import FusionError

POINTS = 18
# What SDPose Draw Keypoints asks of each person, with the number of points.
_DRAWN = {"face_keypoints_2d": 70, "hand_right_keypoints_2d": 21, "hand_left_keypoints_2d": 21}
_NECK, _HIPS, _ANKLES = 1, (8, 11), (10, 13)
# (from, to, kind): a tree from the neck outward; both sides of a kind have one length.
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


def retarget(pose: Any, source: Any, config: RetargetConfig) -> list[dict]:
    """The people of every frame of `pose`, in pixels, with the body proportions of one person of each frame of
    `source`: the first whose neck and hip are detected.

    The pose's directions of limbs, length of the torso and height of the lower foot are preserved. A length is the
    longest of its kind over all frames and both sides, since a limb that points at the camera looks short.
    Raises FusionError, naming the input, if nobody is detected, and ValueError for what are not keypoints.
    The keypoints passed in are not modified.
    """
    frames, source = keypoints.frames(pose, "keypoints"), keypoints.frames(source, "source_keypoints")
    target = _lengths(source, config, "source_keypoints")
    current = _lengths(frames, config, "keypoints")
    factors = {
        name: _factor(target[name] / target["torso"], current[name] / current["torso"], config)
        for name in current if name in target
    }
    for frame in frames:
        for person in _people(frame):
            _move(person, factors, config)
            for key, count in _DRAWN.items():
                person[key] = person.get(key) or [0.0] * (3 * count)
    return frames


def _factor(target: float, current: float, config: RetargetConfig) -> float:
    factor = min(max(target / current, 1 / config.largest_factor), config.largest_factor)
    return factor**config.amount


def _lengths(frames: Sequence[dict], config: RetargetConfig, name: str) -> dict[str, float]:
    """The longest limb of each kind, in pixels."""
    longest: dict[str, float] = {}
    for frame in frames:
        people = [_points(person, name) for person in _people(frame)]
        # Others may stand in front of the one who is wholly visible.
        for points in sorted(people, key=lambda points: not _has_torso(points, config))[:1]:
            for a, b, limb in _LIMBS:
                if _detected(points, a, config) and _detected(points, b, config):
                    length = math.dist(points[a][:2], points[b][:2])
                    longest[limb] = max(longest.get(limb, 0.0), length)
    if not longest.get("torso"):
        raise FusionError(
            f"{name} hold no person with a neck and a hip: connect SDPose Keypoint Extractor with a picture that "
            "shows the body, or lower score_threshold"
        )
    return {limb: length for limb, length in longest.items() if length > 0}


def _has_torso(points: list[list[float]], config: RetargetConfig) -> bool:
    return _detected(points, _NECK, config) and any(_detected(points, hip, config) for hip in _HIPS)


def _people(frame: dict) -> list[dict]:
    """Those with a detected body, or a part of one; detectors also list the hands and faces of others."""
    return [person for person in frame.get("people") or [] if person.get(BODY)]


def _points(person: dict, name: str) -> list[list[float]]:
    flat = person[BODY]
    if len(flat) != 3 * POINTS:
        raise FusionError(f"{name} have {len(flat) // 3} points of a body, where OpenPose has {POINTS}")
    return [[float(value) for value in flat[3 * i : 3 * i + 3]] for i in range(POINTS)]


def _detected(points: list[list[float]], index: int, config: RetargetConfig) -> bool:
    return points[index][2] >= config.score_threshold


def _move(person: dict, factors: dict[str, float], config: RetargetConfig) -> None:
    """Stretch one person in place, from the neck outward, then put the feet back on the ground."""
    before = _points(person, "keypoints")
    if not _detected(before, _NECK, config):
        return
    after = copy.deepcopy(before)
    for a, b, limb in _LIMBS:
        # A joint that was not detected still moves with the one before it.
        factor = factors.get(limb, 1.0) if _detected(before, a, config) and _detected(before, b, config) else 1.0
        for axis in range(2):
            after[b][axis] = after[a][axis] + factor * (before[b][axis] - before[a][axis])
    feet = [i for i in _ANKLES if _detected(before, i, config)]
    if feet:
        drop = max(after[i][1] for i in feet) - max(before[i][1] for i in feet)
        for point in after:
            point[1] -= drop
    person[BODY] = [value for point in after for value in point]
    for key, joints in _ATTACHED.items():
        if person.get(key):
            person[key] = _moved_with(list(person[key]), joints, before, after)


def _moved_with(flat: list[float], joints: Sequence[int], before: list, after: list) -> list[float]:
    """Points that keep their place next to the nearest of some joints."""
    for i in range(0, len(flat) - 2, 3):
        near = min(joints, key=lambda joint: math.dist(flat[i : i + 2], before[joint][:2]))
        for axis in range(2):
            flat[i + axis] += after[near][axis] - before[near][axis]
    return flat
