"""The actions as joint angles over a cycle, and the 18 joints that follow from them by forward kinematics.

Puppet space: the ground is y = 0, y points down, a standing puppet is about 1 high, x = 0 is its middle.
Angles are degrees in the picture: 0 points down, 90 to the viewer's right, 180 up, -90 to the viewer's left.
An action is written as seen unmirrored; side "r" is the puppet's right, at the viewer's left.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .config import MIRROR

TAU = 2 * math.pi


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


@dataclass
class Stance:
    """Joint angles of one moment, in degrees, and how the body is turned."""

    lean: float = 0.0  # of the torso, 0 upright, positive to the viewer's right
    tilt: float = 0.0  # of the head relative to the torso
    turn: float = 0.0  # of the face: -1 to the viewer's left, 1 to the right
    nod: float = 0.0  # of the face downwards, in half heads
    r_arm: tuple[float, float] = (-18, -12)  # upper arm, forearm
    l_arm: tuple[float, float] = (18, 12)
    r_leg: tuple[float, float] = (-5, -3)  # thigh, shin
    l_leg: tuple[float, float] = (5, 3)
    lift: float = 0.0  # of the lowest point above the ground
    narrow: float = 1.0  # apparent width of shoulders and hips, small where the body is turned
    arms: float = 1.0  # length of the arms over the species' own
    legs: float = 1.0
    neck: float = 1.0  # distance of the head from the neck
    r_reach: tuple[float, float] | None = None  # where the right wrist is, in half heads; then r_arm is not used
    hat: tuple[float, float, float] = (0.0, 0.0, 0.0)  # lifted to the right, downwards, turned, likewise


def _standing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=1.5 * s, tilt=2 * s, r_arm=(-20 - 3 * s, -12 - 3 * s), l_arm=(20 - 3 * s, 12 - 3 * s))


def _waving(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(lean=-3, tilt=6, l_arm=(108, 150 + 26 * s), r_arm=(-24, -14), arms=1.25)


def _cheering(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(tilt=3 * s, lean=0, r_arm=(-124 + 8 * s, -160 + 10 * s), l_arm=(124 + 8 * s, 160 + 10 * s),
                  r_leg=(-12, -9), l_leg=(12, 9), arms=1.4)


def _jumping(t: float) -> Stance:
    s = math.sin(TAU * t)
    fold = 52 + 12 * s
    return Stance(lift=0.155 + 0.055 * s, r_arm=(-104 - 8 * s, -134), l_arm=(104 + 8 * s, 134),
                  r_leg=(-fold, 34), l_leg=(fold, -34), arms=1.15)


def _sitting(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=-10 + 2 * s, tilt=8, turn=0.55, narrow=0.75, r_arm=(-34, -22), l_arm=(28, 58 + 8 * s),
                  r_leg=(120, 44), l_leg=(84, 86 + 5 * s), legs=1.16)


def _kicking(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=-16, tilt=10, turn=0.6, narrow=0.85, r_arm=(-66, -96), l_arm=(48, 92),
                  r_leg=(-4, -6), l_leg=(84 + 16 * s, 90 + 14 * s), legs=1.04)


def _running(t: float) -> Stance:
    s, c = math.sin(TAU * t), math.cos(TAU * t)
    return Stance(lean=17, tilt=-10, turn=0.75, narrow=0.6,
                  r_arm=(-58 * s - 4, 62 - 40 * s), l_arm=(58 * s - 4, 62 + 40 * s),
                  r_leg=(56 * s + 12, 52 * s - 36 + 28 * c), l_leg=(-56 * s + 12, -52 * s - 36 - 28 * c),
                  lift=0.03 - 0.015 * math.cos(2 * TAU * t), legs=1.16)


def _dancing(t: float) -> Stance:
    s, c = math.sin(TAU * t), math.cos(TAU * t)
    return Stance(lean=11 + 7 * s, tilt=-14 - 8 * s, r_arm=(-86 - 12 * s, -42 + 16 * c),
                  l_arm=(128 + 10 * s, 168 + 12 * c), r_leg=(-8 - 4 * s, 4), l_leg=(66 + 8 * s, -28 + 8 * s),
                  arms=1.1)


def _handstand(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=180 + 3 * s, tilt=4 * s, r_arm=(40, 4), l_arm=(-40, -4), arms=1.95, neck=0.70,
                  r_leg=(153 + 7 * s, 165 + 7 * s), l_leg=(207 + 7 * s, 195 + 7 * s), legs=1.1)


def _pointing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=4, tilt=4, turn=0.65, narrow=0.92, l_arm=(93 + 5 * s, 91 + 7 * s), r_arm=(-52, 34),
                  arms=1.06, r_leg=(-9, -6), l_leg=(9, 6))


def _bowing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=52 + 9 * s, tilt=-6, turn=0.7, narrow=0.7, r_arm=(-30, -60), l_arm=(-122, -136),
                  r_leg=(-7, -5), l_leg=(5, 3), legs=1.2)


def _crawling(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=82, tilt=-52, neck=1.08, turn=0.7, narrow=0.6, r_arm=(4 + 16 * s, 2 + 10 * s),
                  l_arm=(10 - 16 * s, 6 - 10 * s), r_leg=(-2 - 14 * s, -84), l_leg=(8 + 14 * s, -84),
                  arms=0.74, legs=1.2)


def _saluting(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=-3, r_reach=(-0.70 - 0.06 * s, -0.40 + 0.06 * s), l_arm=(9, 4), r_leg=(-3, -2),
                  l_leg=(3, 2), arms=1.6)


def _lunging(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=10 + 3 * s, tilt=-6, turn=0.7, narrow=0.7, l_arm=(112 + 4 * s, 116 + 4 * s),
                  r_arm=(-72, -74), l_leg=(80 - 4 * s, 2), r_leg=(-62 + 3 * s, -66), legs=1.15)


def _starfish(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=5 * s, r_arm=(-94 - 5 * s, -96 - 7 * s), l_arm=(94 + 5 * s, 96 + 7 * s),
                  r_leg=(-40 - 3 * s, -38), l_leg=(40 + 3 * s, 38), legs=1.06)


def _hugging(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=10 + 3 * s, lean=3 * s, r_arm=(-10, 112 + 6 * s), l_arm=(10, -112 + 6 * s),
                  r_leg=(-3, 5), l_leg=(3, -5), arms=1.3)


def _flexing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=4, r_arm=(-88 - 4 * s, 174 + 12 * s), l_arm=(88 + 4 * s, 186 - 12 * s),
                  r_leg=(-20, -10), l_leg=(20, 10), arms=1.14)


def _balancing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=52 + 4 * s, tilt=-30, turn=0.5, narrow=0.7, r_arm=(-134, -138 + 6 * s),
                  l_arm=(96, 100 + 6 * s), r_leg=(-84 - 5 * s, -90 - 5 * s), l_leg=(2, 0), legs=1.12)


def _akimbo(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=2 * s, tilt=-3 * s, r_arm=(-62 - 3 * s, 42), l_arm=(62 - 3 * s, -42),
                  r_leg=(-14, -10), l_leg=(14, 10))


def _splits(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=4 * s, r_arm=(-52 - 6 * s, -58), l_arm=(52 + 6 * s, 58),
                  r_leg=(-84, -86), l_leg=(84, 86),
                  legs=1.06)


STANCES: dict[str, Callable[[float], Stance]] = {
    "standing": _standing, "waving": _waving, "cheering": _cheering, "jumping": _jumping, "sitting": _sitting,
    "kicking": _kicking, "running": _running, "dancing": _dancing, "handstand": _handstand,
    "pointing": _pointing, "bowing": _bowing, "crawling": _crawling, "saluting": _saluting,
    "lunging": _lunging, "starfish": _starfish, "hugging": _hugging, "flexing": _flexing,
    "balancing": _balancing, "akimbo": _akimbo, "splits": _splits,
}


def _close_waving(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(lean=-3 + 2 * s, tilt=6 + 3 * s, l_arm=(108 + 5 * s, 148 + 30 * s), r_arm=(-20, -12), arms=1.3)


def _close_cheering(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(tilt=4 * math.sin(TAU * t), r_arm=(-112 - 14 * s, -158 - 10 * s),
                  l_arm=(112 + 14 * s, 158 + 10 * s), arms=1.4, nod=-0.06 - 0.06 * s)


def _close_pointing(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(lean=4 + 3 * s, tilt=4 * s, turn=0.8 + 0.15 * s, narrow=0.92, l_arm=(104 + 16 * s, 98 + 16 * s),
                  r_arm=(-20, -10), arms=1.1)


def _nodding(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(nod=0.14 + 0.24 * s, neck=0.97 - 0.05 * s, r_arm=(-14, -8), l_arm=(14, 8))


def _shaking_head(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(turn=1.25 * s, tilt=-2 * s, r_arm=(-14, -8), l_arm=(14, 8))


def _raising_hat(t: float) -> Stance:
    s = 0.5 - 0.5 * math.cos(TAU * t)
    x, y, angle = -0.22 * s, -0.46 * s, 10 * s
    turned = math.radians(angle)
    brim = (-1.05 * math.cos(turned) + 0.48 * math.sin(turned), -1.05 * math.sin(turned) - 0.48 * math.cos(turned))
    return Stance(lean=-2 * s, tilt=4 * s, nod=0.14 * s, hat=(x, y, angle), r_reach=(brim[0] + x, brim[1] + y),
                  l_arm=(14, 8), arms=2.0)


def _turning(t: float) -> Stance:
    s = 0.5 - 0.5 * math.cos(TAU * t)
    return Stance(turn=1.6 * s, narrow=1 - 0.35 * s, lean=5 * s, tilt=-3 * s, r_arm=(-14 + 4 * s, -8),
                  l_arm=(14 + 4 * s, 8))


def _close_saluting(t: float) -> Stance:
    s = 0.5 - 0.5 * math.cos(TAU * t)
    return Stance(lean=2 - 4 * s, tilt=-6 + 8 * s, r_reach=(-0.62 - 0.62 * s, -0.34 - 0.30 * s), l_arm=(9, 4),
                  arms=1.8)


def _close_hugging(t: float) -> Stance:
    s = math.sin(TAU * t)
    return Stance(tilt=12 * s, lean=5 * s, nod=0.08, r_arm=(-26, 118 + 10 * s), l_arm=(26, -118 + 10 * s),
                  arms=1.25)


def _close_flexing(t: float) -> Stance:
    s = math.sin(TAU * 2 * t)
    return Stance(tilt=5 * math.sin(TAU * t), r_arm=(-80 - 12 * s, 176 + 20 * s), l_arm=(80 + 12 * s, 184 - 20 * s),
                  arms=1.2)


# How an action is acted where head and shoulders fill the frame.
CLOSE_UPS: dict[str, Callable[[float], Stance]] = {
    "waving": _close_waving, "cheering": _close_cheering, "pointing": _close_pointing, "nodding": _nodding,
    "shaking head": _shaking_head, "raising hat": _raising_hat, "turning": _turning,
    "saluting": _close_saluting, "hugging": _close_hugging, "flexing": _close_flexing,
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


def stance(action: str, phase: float, framing: str = "full") -> Stance:
    """The angles of a moment. Raises KeyError for an action that the framing does not have."""
    return (CLOSE_UPS if framing == "close_up" else STANCES)[action](phase % 1.0)


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
