"""A puppet's proportions, and the 18 joints that follow from an action's angles by forward kinematics.

Puppet space: the ground is y = 0, y points down, a standing puppet is about 1 high, x = 0 is its middle.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .actions import stance
from .config import MIRROR


@dataclass(frozen=True)
class Body:
    """Lengths of a species in puppet space."""

    torso: float = 0.30
    shoulder: float = 0.155  # half the distance between the shoulders
    hip: float = 0.075
    upper_arm: float = 0.165
    forearm: float = 0.155
    thigh: float = 0.130
    shin: float = 0.120
    head: float = 0.269  # half the head's height
    head_width: float = 1.05  # half the head's width over `head`
    hat_tip: float = 1.56  # of the tallest hat above the head's middle, over `head`


BODIES: dict[str, Body] = {
    "person": Body(),
    "cat": Body(head_width=1.12),
    "robot": Body(shoulder=0.163, head=0.255, head_width=1.06),
    "bear": Body(shoulder=0.163, hip=0.083, head_width=1.10),
    "rabbit": Body(head=0.255, head_width=1.04, hat_tip=1.72),
    "frog": Body(shoulder=0.157, head=0.242, head_width=1.28, hat_tip=1.92, thigh=0.138, shin=0.128),
    "fox": Body(head_width=1.16),
    "penguin": Body(shoulder=0.161, hip=0.086, thigh=0.115, shin=0.110, torso=0.325),
}


TURN = 0.30  # how far a turn of 1 shifts the face, in half heads
EYES = (0.36, -0.06)  # of an eye joint from the face's middle, in half heads
CHEST = 0.27  # how far below the neck the frame of a close-up cuts the chest
_JITTER = 3.0  # degrees, standard deviation of every angle between takes
FOOT, HAND, KNEE, SEAT = 0.045, 0.045, 0.045, 0.075  # what lies below each joint where it touches the ground


def squash(shift: float) -> float:
    """Apparent width of a face that a turn shifts by `shift` half heads."""
    return 1 - 0.5 * abs(shift)


def _ray(origin: tuple[float, float], angle: float, length: float) -> tuple[float, float]:
    a = math.radians(angle)
    return origin[0] + length * math.sin(a), origin[1] + length * math.cos(a)


@functools.lru_cache(maxsize=4096)
def _jitter(seed: int) -> tuple[float, ...]:
    return tuple(np.clip(np.random.default_rng([0x907E, seed]).normal(0, _JITTER, 10), -7, 7).tolist())


def _bent(shoulder: tuple[float, float], wrist: tuple[float, float], upper: float,
          fore: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(elbow, wrist) of a right arm of these lengths that reaches for `wrist`, its elbow away from the body."""
    x, y = wrist[0] - shoulder[0], wrist[1] - shoulder[1]
    reach = min(max(math.hypot(x, y), abs(upper - fore) + 1e-6), upper + fore)
    angle = math.atan2(x, y)
    bend = math.acos(min(1.0, (upper**2 + reach**2 - fore**2) / (2 * upper * reach)))
    elbow = _ray(shoulder, math.degrees(angle + bend), upper)
    return elbow, _ray(shoulder, math.degrees(angle), reach)


def pose(action: str, phase: float, species: str, seed: int = 0, mirrored: bool = False,
         framing: str = "full") -> np.ndarray:
    """The 18 joints of a puppet in puppet space.

    `phase` has period 1; `seed` turns each joint by a few degrees, the same at every phase; seed -1 does not.
    Returns float64 [18, 2]. Raises KeyError for an unknown species or an action that the framing does not have.
    """
    now, body = stance(action, phase, framing), BODIES[species]
    j = _jitter(seed) if seed >= 0 else (0.0,) * 10
    lean = now.lean + 0.7 * j[0]
    head_angle = lean + now.tilt + 1.3 * j[1]

    hip = (0.0, 0.0)
    neck = _ray(hip, 180 - lean, body.torso)
    right = (math.cos(math.radians(lean)), math.sin(math.radians(lean)))  # across the torso, to its left hand
    joints: list[tuple[float, float]] = [(0.0, 0.0)] * 18
    joints[1] = neck
    for first, side, upper, fore in ((2, -1, j[2] + now.r_arm[0], j[3] + now.r_arm[1]),
                                     (5, 1, j[4] + now.l_arm[0], j[5] + now.l_arm[1])):
        half = side * body.shoulder * now.narrow
        down = 0.035
        shoulder = (neck[0] + half * right[0] - down * right[1], neck[1] + half * right[1] + down * right[0])
        elbow = _ray(shoulder, upper, body.upper_arm * now.arms)
        joints[first:first + 3] = shoulder, elbow, _ray(elbow, fore, body.forearm * now.arms)
    for first, side, thigh, shin in ((8, -1, j[6] + now.r_leg[0], j[7] + now.r_leg[1]),
                                     (11, 1, j[8] + now.l_leg[0], j[9] + now.l_leg[1])):
        half = side * body.hip * now.narrow
        socket = (hip[0] + half * right[0], hip[1] + half * right[1])
        knee = _ray(socket, thigh, body.thigh * now.legs)
        joints[first:first + 3] = socket, knee, _ray(knee, shin, body.shin * now.legs)

    a = math.radians(head_angle)
    across, down = (math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))
    centre = _ray(neck, 180 - head_angle, body.head * now.neck)
    shift = TURN * now.turn

    def on_head(x: float, y: float) -> tuple[float, float]:
        return (centre[0] + body.head * (x * across[0] + y * down[0]),
                centre[1] + body.head * (x * across[1] + y * down[1]))

    spread = EYES[0] * squash(shift)
    joints[0] = on_head(1.25 * shift, 0.22 + now.nod)
    joints[14], joints[15] = on_head(shift - spread, EYES[1] + now.nod), on_head(shift + spread, EYES[1] + now.nod)
    joints[16], joints[17] = on_head(-body.head_width, 0.0), on_head(body.head_width, 0.0)
    if now.r_reach:
        joints[3:5] = _bent(joints[2], on_head(*now.r_reach), body.upper_arm * now.arms, body.forearm * now.arms)

    points = np.array(joints)
    touching = [points[10, 1] + FOOT, points[13, 1] + FOOT, points[4, 1] + HAND, points[7, 1] + HAND,
                points[9, 1] + KNEE, points[12, 1] + KNEE, hip[1] + SEAT]
    points[:, 1] -= max(touching) + now.lift
    if mirrored:
        points = points[list(MIRROR)] * (-1, 1)
    return points


def hat_lift(action: str, phase: float, mirrored: bool = False, framing: str = "full") -> tuple[float, float, float]:
    """Where the hat is off the head: to the right and downwards in half heads, and its turn in degrees."""
    x, y, angle = stance(action, phase, framing).hat
    return (-x, y, -angle) if mirrored else (x, y, angle)


# Corners of the largest hat and of ears, in half heads; "tip" is the species' own.
_BRIM, _TIP, _EAR, _CHEEK = 1.30, 0.74, (1.15, -1.35), 1.25


@functools.lru_cache(maxsize=1024)
def extent(action: str, species: str, mirrored: bool, framing: str = "full") -> tuple[float, float, float, float]:
    """(left, top, right, bottom) over a cycle without jitter, in puppet space, with the largest hat.

    Of a close-up, head and arms count, and the bottom is where the frame cuts the chest.
    """
    body, low, high, necks = BODIES[species], [], [], []
    for i in range(12):
        joints = pose(action, i / 12, species, -1, mirrored, framing)
        centre = joints[16:18].mean(0)
        across = (joints[15] - joints[14]) / np.linalg.norm(joints[15] - joints[14])
        down = np.array((-across[1], across[0]))
        x, y, angle = hat_lift(action, i / 12, mirrored, framing)
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        hat = [(u * c - v * s + x, u * s + v * c + y) for v, wide in ((-0.55, _BRIM), (-body.hat_tip, _TIP))
               for u in (-wide, wide)]
        corners = [*hat, (0, 1), (-_CHEEK, 0.35), (_CHEEK, 0.35), _EAR, (-_EAR[0], _EAR[1])]
        head = centre + body.head * (np.array(corners) @ np.stack([across, down]))
        hands = [joints[at] + (joints[at] - joints[at - 1]) * (0.09 / np.linalg.norm(joints[at] - joints[at - 1]))
                 for at in (4, 7)]
        # An arm that hangs down does not count in a close-up.
        seen = ([*joints[[0, 1, 2, 5, 14, 15, 16, 17]], *(p for p in (*joints[[3, 4, 6, 7]], *hands)
                                                           if p[1] < joints[1, 1] + CHEST)]
                if framing == "close_up" else [*joints, *hands])
        points = np.concatenate([seen, head])
        low.append(points.min(0))
        high.append(points.max(0))
        necks.append(joints[1, 1])
    (left, top), (right, bottom) = np.min(low, 0).tolist(), np.max(high, 0).tolist()
    return left, top, right, float(np.mean(necks)) + CHEST if framing == "close_up" else bottom
