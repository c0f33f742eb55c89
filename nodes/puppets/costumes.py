"""Heads, hats and shirts of the paper puppets, each drawn in a local frame of its own."""

from .config import RGB, Identity
from .paper import CIRCLE, INK, Frame, Paper, Point, mix, shade

BLUSH: RGB = (0.96, 0.45, 0.45)
WHITE: RGB = (0.98, 0.97, 0.95)
ROSE: RGB = (0.93, 0.52, 0.56)

HEART = ((0, 0.9), (-0.85, 0.0), (-0.95, -0.45), (-0.6, -0.85), (-0.2, -0.75), (0, -0.4),
         (0.2, -0.75), (0.6, -0.85), (0.95, -0.45), (0.85, 0.0))
STAR = ((0, -1), (0.26, -0.33), (0.97, -0.31), (0.42, 0.14), (0.6, 0.83), (0, 0.44),
        (-0.6, 0.83), (-0.42, 0.14), (-0.97, -0.31), (-0.26, -0.33))
BOLT = ((0.25, -1.05), (-0.7, 0.2), (-0.08, 0.2), (-0.35, 1.05), (0.72, -0.28), (0.08, -0.28))
EMBLEMS = {"heart": HEART, "star": STAR, "bolt": BOLT}

# Half-width of the shirt from the neck (0) to the hem (1).
_SHIRT = ((0.0, 0.62), (0.07, 0.88), (0.2, 0.98), (0.6, 0.95), (0.92, 1.02), (1.0, 0.96))


def _half_width(v: float) -> float:
    for (v0, w0), (v1, w1) in zip(_SHIRT, _SHIRT[1:], strict=False):
        if v <= v1:
            return w0 + (w1 - w0) * (v - v0) / (v1 - v0)
    return _SHIRT[-1][1]


def draw_shirt(paper: Paper, frame: Frame, half: float, length: float, who: Identity) -> None:
    """The torso; `frame` has its origin at the neck and y along the spine."""
    def place(u: float, v: float) -> Point:
        return frame.at(u * half * _half_width(v), v * length)

    def band(u0: float, u1: float, v0: float, v1: float) -> list[Point]:
        steps = [v0 + (v1 - v0) * i / 3 for i in range(4)]
        return [place(u0, v) for v in steps] + [place(u1, v) for v in reversed(steps)]

    outline = [place(-1, v) for v, _ in _SHIRT] + [place(1, v) for v, _ in reversed(_SHIRT)]
    paper.cut(outline, who.shirt, "torso")
    if who.detail == "two_tone":
        halves = [place(0, v) for v, _ in _SHIRT] + [place(1, v) for v, _ in reversed(_SHIRT)]
        paper.cut(halves, who.detail_colour, "torso", inked=False)
    if who.pattern == "striped":
        for v in (0.16, 0.50, 0.84):
            paper.cut(band(-1, 1, v - 0.02, min(v + 0.15, 1)), who.pattern_colour, "torso", inked=False)
    elif who.pattern == "dotted":
        for row, v in enumerate((0.2, 0.5, 0.8)):
            for u in ((-0.55, 0.55) if row % 2 == 0 else (-0.02,)):
                x = u * half * _half_width(v)
                paper.cut(frame.ellipse(x, v * length, 0.112 * length, 0.112 * length),
                          who.pattern_colour, "torso", inked=False)
        for u in (-0.96, 0.96):
            v, r = 0.5, 0.112 * length
            x = u * half * _half_width(v)
            points = [(min(max(px, -abs(x)), abs(x)), py) for px, py in
                      ((x + r * c * 0.94, v * length + r * s) for c, s in _half_circle(u))]
            paper.cut(frame.points(points), who.pattern_colour, "torso", inked=False)
    elif who.pattern == "checked":
        for row in range(4):
            for column in range(4):
                if (row + column) % 2:
                    paper.cut(band(-1 + column * 0.5, -0.5 + column * 0.5, row * 0.25, row * 0.25 + 0.25),
                              who.pattern_colour, "torso", inked=False)
    if who.detail in EMBLEMS:
        size = 0.27 * length
        emblem = Frame(frame.at(0, 0.52 * length), frame.unit * size, 0.0)
        emblem.cos, emblem.sin = frame.cos * size, frame.sin * size
        paper.cut(emblem.points(EMBLEMS[who.detail]), who.detail_colour, "torso", edge=INK)


def _half_circle(side: float) -> list[Point]:
    return [(c, s) for c, s in CIRCLE if c * side <= 0.05]


def draw_scarf(paper: Paper, frame: Frame, half: float, length: float, who: Identity) -> None:
    colour = who.detail_colour
    paper.cut(frame.points(((0.1 * half, 0.0), (0.72 * half, 0.0), (0.66 * half, 0.62 * length),
                            (0.2 * half, 0.62 * length))), shade(colour, 0.86), "extras")
    paper.cut(frame.ellipse(0, 0.05 * length, 0.95 * half, 0.17 * length), colour, "extras")


def draw_ears(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    """What stands out behind the face: ears, antenna, hair. `turn` shifts the features, -0.3..0.3."""
    skin, accent, folded = who.skin, who.accent, who.detail == "ear"
    cut = paper.cut
    if who.species == "person":
        if folded:
            cut(head.ellipse(-1.12, 0.12, 0.30, 0.62, 24), accent, "ears")
            paper.brad(head.at(-0.95, -0.28), "ears", 1.6)
        cut(head.ellipse(0, -0.06, 1.10, 1.06), accent, "ears")
        cut(head.points(((-1.08, -0.1), (-1.12, 0.62), (-0.66, 0.74), (-0.5, 0.2))), accent, "ears")
        cut(head.points(((1.08, -0.1), (1.12, 0.62), (0.66, 0.74), (0.5, 0.2))), accent, "ears")
    elif who.species in ("cat", "fox"):
        for side in (-1, 1):
            tip = (side * 1.06, -1.36)
            root = ((side * 1.06, -0.30), (side * 0.26, -0.86))
            if folded and side == 1:
                tip = (side * 1.02, -0.98)
            cut(head.points((root[0], tip, root[1])), skin, "ears")
            inner = shade(skin, 0.35) if who.species == "fox" else ROSE
            if folded and side == 1:
                flap = ((side * 1.05, -0.98), (side * 0.50, -0.96), (side * 1.2, -0.42))
                cut(head.points(flap), inner, "ears")
            elif who.species == "fox":
                point = ((side * 1.06, -0.98), tip, (side * 0.75, -1.16))
                cut(head.points(point), inner, "ears", inked=False)
            else:
                lining = ((side * 0.95, -0.5), (side * 0.99, -1.14), (side * 0.52, -0.85))
                cut(head.points(lining), inner, "ears", inked=False)
    elif who.species == "bear":
        for side in (-1, 1):
            if folded and side == 1:
                cut(head.ellipse(0.90, -0.66, 0.40, 0.21, 42), accent, "ears")
                continue
            cut(head.ellipse(side * 0.84, -0.74, 0.40, 0.40), skin, "ears")
            cut(head.ellipse(side * 0.84, -0.74, 0.21, 0.21), accent, "ears", inked=False)
    elif who.species == "rabbit":
        for side in (-1, 1):
            if folded and side == 1:
                cut(head.ellipse(0.62, -1.06, 0.24, 0.42, 14), skin, "ears")
                cut(head.ellipse(0.98, -1.12, 0.44, 0.22, 30), accent, "ears", edge=mix(skin, INK, 0.5))
                continue
            cut(head.ellipse(side * 0.66, -1.24, 0.26, 0.66, side * 16), skin, "ears")
            cut(head.ellipse(side * 0.67, -1.22, 0.12, 0.46, side * 16), accent, "ears", inked=False)
    elif who.species == "robot":
        for side in (-1, 1):
            cut(head.points(((side * 0.9, -0.28), (side * 1.22, -0.22), (side * 1.22, 0.26),
                             (side * 0.9, 0.32))),
                shade(skin, 0.72), "ears")
        top = head.at(0.75, -1.1) if folded else head.at(0.72, -1.42)
        foot = head.at(0.72, -0.8)
        if folded:
            paper.stroke([foot, head.at(0.72, -1.24), head.at(1.16, -1.24)], accent, "ears", 1.8)
            top = head.at(1.2, -1.2)
        else:
            paper.stroke([foot, top], accent, "ears", 1.8)
        cut(Frame(top, head.unit, 0).ellipse(0, 0, 0.17, 0.17), (0.93, 0.30, 0.25), "ears")
    elif who.species == "penguin" and folded:
        for side in (-1, 1):
            for rise in (0, 1, 2):
                cut(head.ellipse(side * (1.14 - 0.06 * rise), -0.30 - 0.22 * rise, 0.36, 0.09,
                                 -side * (14 + 16 * rise)), accent, "ears")


def draw_head(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    """The head and its face; head units are half the head's height, y down."""
    species, skin, accent = who.species, who.skin, who.accent
    cut = paper.cut
    if species == "robot":
        w, h, c = 1.02, 0.92, 0.26
        cut(head.points(((-w + c, -h), (w - c, -h), (w, -h + c), (w, h - c), (w - c, h), (-w + c, h),
                         (-w, h - c), (-w, -h + c))), skin, "head")
        cut(head.points(((turn - 0.72, -0.46), (turn + 0.72, -0.46), (turn + 0.72, 0.26),
                         (turn - 0.72, 0.26))),
            accent, "face")
    elif species == "frog":
        for side in (-1, 1):
            cut(head.ellipse(turn * 0.7 + side * 0.60, -0.74, 0.39, 0.39), skin, "head")
        cut(head.ellipse(0, 0.08, 1.28, 0.92), skin, "head")
        if who.detail == "ear":
            spots = ((-0.98, -0.06, 0.17), (-0.66, 0.06, 0.13), (-0.30, -0.40, 0.16), (-0.92, 0.34, 0.12))
            for x, y, r in spots:
                cut(head.ellipse(x, y, r, r), shade(skin, 0.52), "head", inked=False)
    elif species == "fox":
        cut(head.points(((-0.62, -0.86), (0, -0.98), (0.62, -0.86), (1.02, -0.38), (1.30, 0.34), (0.72, 0.66),
                         (0.30, 0.98), (-0.30, 0.98), (-0.72, 0.66), (-1.30, 0.34), (-1.02, -0.38))), skin,
                         "head")
        for side in (-1, 1):
            cut(head.points(((turn + side * 0.02, 0.34), (turn + side * 0.38, 0.10), (side * 1.22, 0.34),
                             (side * 0.70, 0.62), (side * 0.28, 0.92), (turn * 0.5, 0.92))), accent, "face",
                inked=False)
    elif species == "cat":
        cut(head.points([(x * 1.12, y * 0.94 + (0.06 if y > 0 else 0)) for x, y in _squircle()]), skin,
            "head")
    elif species == "person":
        cut(head.ellipse(0, 0.06, 0.97, 0.94), skin, "head")
    else:
        cut(head.ellipse(0, 0, 1.10 if species == "bear" else 1.04, 0.97), skin, "head")
    _draw_patch(paper, head, turn, who)
    _draw_face(paper, head, turn, who)


def _squircle() -> list[Point]:
    return [(abs(c) ** 0.8 * (1 if c > 0 else -1), abs(s) ** 0.85 * (1 if s > 0 else -1)) for c, s in CIRCLE]


def _draw_patch(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    if who.detail == "eye_patch":
        x, y = (-0.60, -0.74) if who.species == "frog" else (-0.40, -0.10)
        paper.cut(head.ellipse(turn + x, y, 0.36, 0.40), who.detail_colour, "face", inked=False)


def _draw_face(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    species, skin, accent = who.species, who.skin, who.accent
    cut, stroke = paper.cut, paper.stroke
    eye_y, spread, size = -0.06, 0.38, 0.13
    if species == "penguin":
        for side in (-1, 1):
            cut(head.ellipse(turn + side * 0.36, 0.0, 0.46, 0.52), WHITE, "face", inked=False)
        cut(head.ellipse(turn, 0.42, 0.66, 0.44), WHITE, "face", inked=False)
        if who.detail == "eye_patch":
            cut(head.ellipse(turn - 0.40, -0.08, 0.34, 0.36), who.detail_colour, "face", inked=False)
    elif species == "bear":
        cut(head.ellipse(turn * 1.2, 0.40, 0.52, 0.40), accent, "face", inked=False)
    elif species == "cat":
        for side in (-1, 1):
            cut(head.ellipse(turn * 1.2 + side * 0.20, 0.38, 0.28, 0.23), accent, "face", inked=False)
    elif species == "rabbit":
        cut(head.ellipse(turn * 1.2, 0.42, 0.40, 0.30), WHITE, "face", inked=False)
    elif species == "frog":
        eye_y, spread = -0.76, 0.60
        cut(head.ellipse(turn * 0.7, 0.58, 0.80, 0.34), accent, "face", inked=False)
    if species == "person":
        fringe = ((-1.0, -0.06), (-0.98, -0.46), (-0.62, -0.86), (0, -0.99), (0.62, -0.86), (0.98, -0.46),
                  (1.0, -0.06),
                  (0.70, -0.30), (turn + 0.30, -0.46), (turn - 0.18, -0.36), (-0.66, -0.34))
        cut(head.points(fringe), accent, "ears", inked=False)
    if species == "robot":
        for side in (-1, 1):
            glow = who.detail_colour if who.detail == "eye_patch" and side == -1 else (0.55, 0.95, 0.92)
            wide = 0.26 if who.detail == "eye_patch" and side == -1 else 0.19
            cut(head.ellipse(turn + side * 0.36, -0.10, wide, wide), glow, "face", inked=False)
            cut(head.ellipse(turn + side * 0.36, -0.10, 0.08, 0.08), INK, "face", inked=False)
        stroke([head.at(turn - 0.40, 0.58), head.at(turn + 0.40, 0.58)], accent, "face", 2.6)
        for x in (-0.2, 0.0, 0.2):
            stroke([head.at(turn + x, 0.47), head.at(turn + x, 0.69)], skin, "face", 0.7)
        return
    for side in (-1, 1):
        x = (turn * 0.9 if species == "frog" else turn) + side * spread
        if species == "frog":
            cut(head.ellipse(x, eye_y, 0.27, 0.27), WHITE, "face", inked=False)
        elif species == "cat" and max(skin) < 0.42:  # black eyes would be lost on black fur
            cut(head.ellipse(x, eye_y, 0.19, 0.20), WHITE, "face", inked=False)
        cut(head.ellipse(x, eye_y, size, size * 1.2), INK, "face", inked=False)
        cut(head.ellipse(x + 0.045, eye_y - 0.06, 0.05, 0.05), WHITE, "face", inked=False)
        cut(head.ellipse(turn * 0.9 + side * (0.92 if species == "frog" else 0.66), 0.30, 0.17, 0.12),
            mix(skin, BLUSH, 0.62), "face", inked=False)
    n = turn * 1.25
    mouth = mix(INK, (0.5, 0.1, 0.1), 0.35)
    if species == "penguin":
        cut(head.points(((n - 0.24, 0.14), (n, 0.04), (n + 0.24, 0.14), (n, 0.46))), accent, "face")
    elif species == "frog":
        arc = [(-0.62, 0.26), (-0.36, 0.46), (0, 0.54), (0.36, 0.46), (0.62, 0.26)]
        stroke([head.at(n * 0.8 + x, y) for x, y in arc], mouth, "face", 1.3)
    elif species == "person":
        cut(head.ellipse(n, 0.20, 0.10, 0.08), mix(skin, BLUSH, 0.5), "face", inked=False)
        arc = [(-0.24, 0.42), (-0.12, 0.53), (0, 0.57), (0.12, 0.53), (0.24, 0.42)]
        stroke([head.at(n + x, y) for x, y in arc], mouth, "face", 1.2)
    else:
        nose = ROSE if species in ("cat", "rabbit") else INK
        top = 0.78 if species == "fox" else 0.20
        if species == "fox":
            cut(head.ellipse(turn * 0.7, 0.86, 0.19, 0.15), nose, "face", inked=False)
            return
        cut(head.ellipse(n, top, 0.15, 0.11), nose, "face", inked=False)
        smile = [(-0.24, 0.44), (-0.12, 0.52), (0, 0.40), (0.12, 0.52), (0.24, 0.44)]
        stroke([head.at(n + x, y) for x, y in smile], mouth, "face", 1.0)
        if species == "rabbit":
            cut(head.points(((n - 0.10, 0.50), (n + 0.10, 0.50), (n + 0.09, 0.70), (n - 0.09, 0.70))), WHITE,
                "face",
                edge=mix(skin, INK, 0.5))
        if species == "cat":
            for side in (-1, 1):
                for y, dy in ((0.32, -0.06), (0.46, 0.06)):
                    stroke([head.at(n + side * 0.5, y), head.at(n * 0.4 + side * 1.22, y + dy)],
                           mix(skin, INK, 0.6), "face", 0.6)


def draw_headwear(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    colour, cut = who.headwear_colour, paper.cut
    raised = -0.44 if who.species == "frog" else 0.0
    dark = mix(colour, INK, 0.32)

    def place(points: tuple[Point, ...]) -> list[Point]:
        return head.points([(x, y + raised) for x, y in points])

    if who.headwear == "cap":
        cut(place(((-0.74, -0.62), (-0.70, -0.96), (-0.44, -1.22), (0, -1.32), (0.44, -1.22), (0.70, -0.96),
                   (0.74, -0.62))), colour, "headwear")
        side = -1 if turn < -0.02 else 1
        cut(place(((side * -0.50, -0.66), (side * 0.76, -0.72), (side * 1.30, -0.56), (side * 1.16, -0.42),
                   (side * -0.40, -0.46))), dark, "headwear")
        cut(head.ellipse(0, -1.32 + raised, 0.10, 0.08), dark, "headwear", inked=False)
    elif who.headwear == "beanie":
        cut(head.ellipse(0, -1.52 + raised, 0.24, 0.24), mix(colour, WHITE, 0.62), "headwear")
        cut(place(((-0.82, -0.60), (-0.76, -1.02), (-0.46, -1.34), (0, -1.44), (0.46, -1.34), (0.76, -1.02),
                   (0.82, -0.60))), colour, "headwear")
        cut(place(((-0.88, -0.46), (-0.86, -0.76), (0, -0.86), (0.86, -0.76), (0.88, -0.46), (0, -0.56))),
            mix(colour, WHITE, 0.62), "headwear")
    elif who.headwear == "top hat":
        cut(place(((-0.56, -0.80), (-0.62, -1.72), (0.62, -1.72), (0.56, -0.80))), colour, "headwear")
        band = WHITE if max(colour) < 0.5 else mix(colour, INK, 0.62)
        cut(place(((-0.565, -0.84), (-0.58, -1.06), (0.58, -1.06), (0.565, -0.84))), band, "headwear",
            inked=False)
        cut(head.ellipse(0, -0.76 + raised, 0.98, 0.15), colour, "headwear")
    elif who.headwear == "crown":
        cut(place(((-0.66, -0.66), (-0.78, -1.46), (-0.40, -1.10), (0, -1.62), (0.40, -1.10), (0.78, -1.46),
                   (0.66, -0.66))), colour, "headwear")
        for x, y in ((-0.78, -1.48), (0, -1.64), (0.78, -1.48)):
            cut(head.ellipse(x, y + raised, 0.11, 0.11), mix(colour, WHITE, 0.6), "headwear", inked=False)
        cut(head.ellipse(0, -0.90 + raised, 0.14, 0.14), dark, "headwear", inked=False)


def draw_tail(paper: Paper, hip: Frame, side: float, who: Identity) -> None:
    """Behind everything; `side` is -1 or 1, `hip` has its origin at the hips and y along the spine."""
    skin, cut = who.skin, paper.cut
    if who.species == "cat":
        curve = ((0.0, 0.0), (0.13, 0.02), (0.21, -0.06), (0.22, -0.17), (0.28, -0.23))
        curl = [(side * x, y) for x, y in curve]
        paper.stroke(hip.points(curl), mix(skin, INK, 0.55), "extras", 6.4)
        paper.stroke(hip.points(curl), skin, "extras", 4.8)
    elif who.species == "fox":
        cut(hip.ellipse(side * 0.19, -0.04, 0.16, 0.085, side * -38), skin, "extras")
        cut(hip.ellipse(side * 0.275, -0.105, 0.07, 0.06, side * -38), who.accent, "extras", inked=False)
    elif who.species in ("rabbit", "bear"):
        r = 0.062 if who.species == "rabbit" else 0.045
        cut(hip.ellipse(side * 0.125, 0.0, r, r), WHITE if who.species == "rabbit" else skin, "extras")
