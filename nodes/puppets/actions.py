"""The actions as joint angles over a cycle, of the full figure and of close-ups.

Angles are degrees in the picture: 0 points down, 90 to the viewer's right, 180 up, -90 to the viewer's left.
An action is written as seen unmirrored; side "r" is the puppet's right, at the viewer's left.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

TAU = 2 * math.pi


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


def stance(action: str, phase: float, framing: str = "full") -> Stance:
    """The angles of a moment. Raises KeyError for an action that the framing does not have."""
    return (CLOSE_UPS if framing == "close_up" else STANCES)[action](phase % 1.0)
