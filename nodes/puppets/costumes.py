"""Heads, hats and shirts of the paper puppets, each drawn in a local frame of its own."""

from .config import RGB, Identity
from .paper import CIRCLE, INK, Frame, Paper, Point, mix, shade
from .skeleton import squash

BLUSH: RGB = (0.96, 0.45, 0.45)
WHITE: RGB = (0.98, 0.97, 0.95)
ROSE: RGB = (0.93, 0.52, 0.56)

HEART = ((0, 0.9), (-0.85, 0.0), (-0.95, -0.45), (-0.6, -0.85), (-0.2, -0.75), (0, -0.4),
         (0.2, -0.75), (0.6, -0.85), (0.95, -0.45), (0.85, 0.0))
STAR = ((0, -1), (0.26, -0.33), (0.97, -0.31), (0.42, 0.14), (0.6, 0.83), (0, 0.44),
        (-0.6, 0.83), (-0.42, 0.14), (-0.97, -0.31), (-0.26, -0.33))
BOLT = ((0.45, -1.05), (-0.85, 0.22), (-0.16, 0.22), (-0.45, 1.05), (0.87, -0.30), (0.18, -0.30))
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
        for v in (0.14, 0.47, 0.80):
            paper.cut(band(-1, 1, v, v + 0.17), who.pattern_colour, "torso", inked=False)
    elif who.pattern == "dotted":
        r = 0.125 * length
        for row, v in enumerate((0.21, 0.52, 0.83)):
            for u in ((-0.52, 0.52) if row % 2 == 0 else (0.0,)):
                x = u * half * _half_width(v)
                paper.cut(frame.ellipse(x, v * length, r, r), who.pattern_colour, "torso", inked=False)
        for u in (-0.96, 0.96):
            v = 0.52
            x = u * half * _half_width(v)
            points = [(min(max(px, -abs(x)), abs(x)), py) for px, py in
                      ((x + r * c * 0.94, v * length + r * s) for c, s in _half_circle(u))]
            paper.cut(frame.points(points), who.pattern_colour, "torso", inked=False)
    elif who.pattern == "checked":
        rows = (0.0, 0.27, 0.54, 0.81, 1.0)
        for row, (v0, v1) in enumerate(zip(rows, rows[1:], strict=False)):
            for column in range(4):
                if (row + column) % 2:
                    paper.cut(band(-1 + column * 0.5, -0.5 + column * 0.5, v0, v1),
                              who.pattern_colour, "torso", inked=False)
    if who.detail in EMBLEMS:
        size = 0.30 * length
        emblem = Frame(frame.at(0, 0.47 * length), frame.unit * size, frame.angle)
        paper.cut(emblem.points(EMBLEMS[who.detail]), who.detail_colour, "torso", edge=INK)


def _half_circle(side: float) -> list[Point]:
    return [(c, s) for c, s in CIRCLE if c * side <= 0.05]


def draw_scarf(paper: Paper, frame: Frame, half: float, length: float, who: Identity) -> None:
    colour = who.detail_colour
    paper.cut(frame.points(((0.1 * half, 0.0), (0.72 * half, 0.0), (0.66 * half, 0.62 * length),
                            (0.2 * half, 0.62 * length))), shade(colour, 0.86), "extras")
    paper.cut(frame.ellipse(0, 0.05 * length, 0.95 * half, 0.17 * length), colour, "extras")


def draw_ears(paper: Paper, head: Frame, who: Identity) -> None:
    """What stands out behind the face: ears, antenna, hair."""
    skin, accent, folded = who.skin, who.accent, who.detail == "ear"
    cut = paper.cut
    if who.species == "person":
        if folded:
            cut(head.ellipse(-1.12, 0.22, 0.38, 0.66, 24), accent, "ears")
            cut(head.ellipse(-0.98, -0.24, 0.17, 0.17), who.detail_colour, "ears")
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
                cut(head.ellipse(0.98, -0.60, 0.44, 0.27, 48), accent, "ears")
                continue
            cut(head.ellipse(side * 0.88, -0.72, 0.42, 0.42), skin, "ears")
            cut(head.ellipse(side * 0.88, -0.72, 0.23, 0.23), accent, "ears", inked=False)
    elif who.species == "rabbit":
        for side in (-1, 1):
            if folded and side == 1:
                cut(head.ellipse(0.72, -0.96, 0.26, 0.42, 24), skin, "ears")
                cut(head.ellipse(1.10, -0.86, 0.50, 0.26, 46), accent, "ears", edge=mix(skin, INK, 0.5))
                continue
            cut(head.ellipse(side * 0.80, -1.06, 0.28, 0.66, side * 24), skin, "ears")
            cut(head.ellipse(side * 0.82, -1.06, 0.14, 0.46, side * 24), accent, "ears", inked=False)
    elif who.species == "robot":
        for side in (-1, 1):
            cut(head.points(((side * 0.9, -0.28), (side * 1.22, -0.22), (side * 1.22, 0.26),
                             (side * 0.9, 0.32))),
                shade(skin, 0.72), "ears")
        foot, top = head.at(0.84, -0.7), head.at(1.02, -1.34)
        if folded:
            top = head.at(1.42, -0.72)
            paper.stroke([foot, head.at(0.94, -1.14), head.at(1.36, -1.10), top], accent, "ears", 2.6)
        else:
            paper.stroke([foot, top], accent, "ears", 2.6)
        cut(Frame(top, head.unit, 0).ellipse(0, 0, 0.21, 0.21), (0.93, 0.30, 0.25), "ears")
    elif who.species == "penguin" and folded:
        for side in (-1, 1):
            for y, angle in ((-0.44, 34), (-0.10, 8)):
                cut(head.ellipse(side * 1.12, y, 0.40, 0.15, -side * angle), accent, "ears")


def draw_head(paper: Paper, head: Frame, turn: float, nod: float, who: Identity) -> None:
    """The head and its face, which `turn` shifts to the right and `nod` downwards, both in half heads.

    Head units are half the head's height, y down.
    """
    species, skin, accent = who.species, who.skin, who.accent
    cut = paper.cut
    narrow = squash(turn)
    face, turn = Frame(head.at(0, nod), head.unit, head.angle, narrow), turn / narrow
    if species == "robot":
        w, h, c = 1.02, 0.92, 0.26
        cut(head.points(((-w + c, -h), (w - c, -h), (w, -h + c), (w, h - c), (w - c, h), (-w + c, h),
                         (-w, h - c), (-w, -h + c))), skin, "head")
        cut(face.points(((turn - 0.74, -0.46), (turn + 0.74, -0.46), (turn + 0.74, 0.26), (turn - 0.74, 0.26))),
            accent, "face")
    elif species == "frog":
        for side in (-1, 1):
            cut(face.ellipse(turn * 0.7 + side * 0.60, -0.74, 0.39, 0.39), skin, "head")
        cut(head.ellipse(0, 0.08, 1.28, 0.92), skin, "head")
        if who.detail == "ear":
            spots = ((-0.92, -0.08, 0.22), (0.88, -0.20, 0.20), (-0.06, -0.44, 0.22), (0.98, 0.26, 0.16))
            for x, y, r in spots:
                cut(head.ellipse(x, y, r, r), shade(skin, 0.52), "head", inked=False)
    elif species == "fox":
        cut(head.points(((-0.62, -0.86), (0, -0.98), (0.62, -0.86), (1.02, -0.38), (1.30, 0.34), (0.72, 0.66),
                         (0.30, 0.98), (-0.30, 0.98), (-0.72, 0.66), (-1.30, 0.34), (-1.02, -0.38))), skin,
                         "head")
        for side in (-1, 1):
            inner = [face.at(turn + side * 0.02, 0.34), face.at(turn + side * 0.38, 0.10)]
            outer = head.points(((side * 1.22, 0.34), (side * 0.70, 0.62), (side * 0.28, 0.92), (turn * 0.5, 0.92)))
            cut(inner + outer, accent, "face", inked=False)
    elif species == "cat":
        cut(head.points([(x * 1.12, y * 0.94 + (0.06 if y > 0 else 0)) for x, y in _squircle()]), skin,
            "head")
    elif species == "person":
        cut(head.ellipse(0, 0.06, 0.97, 0.94), skin, "head")
    else:
        cut(head.ellipse(0, 0, 1.10 if species == "bear" else 1.04, 0.97), skin, "head")
    _draw_patch(paper, face, turn, who)
    _draw_face(paper, head, face, turn, who)


def _squircle() -> list[Point]:
    return [(abs(c) ** 0.8 * (1 if c > 0 else -1), abs(s) ** 0.85 * (1 if s > 0 else -1)) for c, s in CIRCLE]


def _draw_patch(paper: Paper, face: Frame, turn: float, who: Identity) -> None:
    if who.detail == "eye_patch":
        x, y = (-0.60, -0.74) if who.species == "frog" else (-0.40, -0.08)
        paper.cut(face.ellipse(turn + x, y, 0.40, 0.44), who.detail_colour, "face", inked=False)


def _draw_face(paper: Paper, head: Frame, face: Frame, turn: float, who: Identity) -> None:
    species, skin, accent = who.species, who.skin, who.accent
    cut, stroke = paper.cut, paper.stroke
    eye_y, spread, size = -0.06, 0.38, 0.15
    n = turn * 1.25
    if species == "penguin":
        for side in (-1, 1):
            cut(face.ellipse(turn + side * 0.36, 0.0, 0.46, 0.52), WHITE, "face", inked=False)
        cut(face.ellipse(turn, 0.42, 0.66, 0.44), WHITE, "face", inked=False)
        if who.detail == "eye_patch":
            cut(face.ellipse(turn - 0.40, -0.08, 0.38, 0.40), who.detail_colour, "face", inked=False)
    elif species == "bear":
        cut(face.ellipse(turn * 1.2, 0.40, 0.54, 0.40), accent, "face", inked=False)
    elif species == "cat":
        for side in (-1, 1):
            cut(face.ellipse(turn * 1.2 + side * 0.22, 0.40, 0.31, 0.26), accent, "face", inked=False)
    elif species == "rabbit":
        cut(face.ellipse(turn * 1.2, 0.44, 0.44, 0.34), WHITE, "face", inked=False)
    elif species == "frog":
        eye_y, spread = -0.76, 0.60
        cut(face.ellipse(turn * 0.7, 0.56, 0.82, 0.34), accent, "face", inked=False)
    elif species == "person":
        fringe = [head.at(*p) for p in ((-1.0, -0.06), (-0.98, -0.46), (-0.62, -0.86), (0, -0.99), (0.62, -0.86),
                                        (0.98, -0.46), (1.0, -0.06), (0.74, -0.30))]
        cut([*fringe, *face.points(((turn + 0.30, -0.46), (turn - 0.18, -0.34))), head.at(-0.70, -0.34)], accent,
            "ears", inked=False)
    if species == "robot":
        for side in (-1, 1):
            patched = who.detail == "eye_patch" and side == -1
            glow, wide = (who.detail_colour, 0.33) if patched else ((0.55, 0.95, 0.92), 0.23)
            cut(face.ellipse(turn + side * 0.36, -0.10, wide, wide), glow, "face", inked=False)
            cut(face.ellipse(turn + side * 0.36, -0.10, 0.10, 0.10), INK, "face", inked=False)
        cut(face.points(((n - 0.46, 0.48), (n + 0.46, 0.48), (n + 0.46, 0.70), (n - 0.46, 0.70))), accent, "face",
            inked=False)
        for x in (-0.22, 0.0, 0.22):
            cut(face.points(((n + x - 0.05, 0.48), (n + x + 0.05, 0.48), (n + x + 0.05, 0.70), (n + x - 0.05, 0.70))),
                skin, "face", inked=False)
        return
    for side in (-1, 1):
        x = (turn * 0.9 if species == "frog" else turn) + side * spread
        if species == "frog":
            cut(face.ellipse(x, eye_y, 0.28, 0.28), WHITE, "face", inked=False)
        elif species == "cat" and max(skin) < 0.42:  # black eyes would be lost on black fur
            cut(face.ellipse(x, eye_y, 0.22, 0.24), WHITE, "face", inked=False)
        cut(face.ellipse(x, eye_y, size, size * 1.2), INK, "face", inked=False)
        cut(face.ellipse(x + 0.05, eye_y - 0.06, 0.06, 0.06), WHITE, "face", inked=False)
        cut(face.ellipse(turn * 0.9 + side * (0.90 if species == "frog" else 0.64), 0.30, 0.18, 0.13),
            mix(skin, BLUSH, 0.62), "face", inked=False)
    mouth = mix(INK, (0.5, 0.1, 0.1), 0.35)
    if species == "penguin":
        cut(face.points(((n - 0.28, 0.12), (n, 0.02), (n + 0.28, 0.12), (n, 0.50))), accent, "face")
    elif species == "frog":
        arc = [(-0.62, 0.26), (-0.36, 0.46), (0, 0.54), (0.36, 0.46), (0.62, 0.26)]
        stroke([face.at(n * 0.8 + x, y) for x, y in arc], mouth, "face", 2.0)
    elif species == "person":
        cut(face.ellipse(n, 0.20, 0.11, 0.09), mix(skin, BLUSH, 0.5), "face", inked=False)
        arc = [(-0.28, 0.42), (-0.14, 0.54), (0, 0.58), (0.14, 0.54), (0.28, 0.42)]
        stroke([face.at(n + x, y) for x, y in arc], mouth, "face", 2.0)
    elif species == "fox":
        cut(face.ellipse(turn * 0.7, 0.84, 0.21, 0.17), INK, "face", inked=False)
    else:
        nose = ROSE if species in ("cat", "rabbit") else INK
        cut(face.ellipse(n, 0.22, 0.18, 0.13), nose, "face", inked=False)
        smile = [(-0.30, 0.44), (-0.26, 0.53), (-0.16, 0.57), (-0.05, 0.53), (0, 0.42), (0.05, 0.53), (0.16, 0.57),
                 (0.26, 0.53), (0.30, 0.44)]
        if species == "rabbit":
            cut(face.points(((n - 0.14, 0.50), (n + 0.14, 0.50), (n + 0.12, 0.74), (n - 0.12, 0.74))), WHITE, "face",
                edge=mix(skin, INK, 0.5))
        stroke([face.at(n + x, y) for x, y in smile], mouth, "face", 2.0)
        if species == "cat":
            for side in (-1, 1):
                for y, dy in ((0.28, -0.08), (0.50, 0.08)):
                    stroke([face.at(n + side * 0.56, y), head.at(n * 0.3 + side * 1.26, y + dy)],
                           mix(skin, INK, 0.6), "face", 1.6)


def draw_headwear(paper: Paper, head: Frame, turn: float, who: Identity) -> None:
    colour, cut = who.headwear_colour, paper.cut
    raised = -0.40 if who.species == "frog" else 0.0
    dark = mix(colour, INK, 0.32)

    def place(points: tuple[Point, ...]) -> list[Point]:
        return head.points([(x, y + raised) for x, y in points])

    if who.headwear == "cap":
        cut(place(((-0.92, -0.52), (-0.90, -0.88), (-0.58, -1.20), (0, -1.32), (0.58, -1.20), (0.90, -0.88),
                   (0.92, -0.52))), colour, "headwear")
        side = -1 if turn < -0.02 else 1
        cut(place(((side * -0.62, -0.62), (side * 0.80, -0.70), (side * 1.36, -0.52), (side * 1.22, -0.34),
                   (side * -0.56, -0.38))), dark, "headwear")
        cut(head.ellipse(0, -1.33 + raised, 0.15, 0.11), dark, "headwear", inked=False)
    elif who.headwear == "beanie":
        cut(head.ellipse(0, -1.34 + raised, 0.28, 0.26), mix(colour, WHITE, 0.62), "headwear")
        cut(place(((-0.98, -0.50), (-0.94, -0.88), (-0.60, -1.18), (0, -1.28), (0.60, -1.18), (0.94, -0.88),
                   (0.98, -0.50))), colour, "headwear")
        cut(place(((-1.06, -0.34), (-1.04, -0.70), (0, -0.80), (1.04, -0.70), (1.06, -0.34), (0, -0.46))),
            mix(colour, WHITE, 0.62), "headwear")
    elif who.headwear == "top hat":
        cut(place(((-0.66, -0.68), (-0.74, -1.56), (0.74, -1.56), (0.66, -0.68))), colour, "headwear")
        band = WHITE if max(colour) < 0.5 else mix(colour, INK, 0.62)
        cut(place(((-0.67, -0.76), (-0.69, -1.02), (0.69, -1.02), (0.67, -0.76))), band, "headwear", inked=False)
        cut(head.ellipse(0, -0.66 + raised, 1.16, 0.19), colour, "headwear")
    elif who.headwear == "crown":
        cut(place(((-0.82, -0.50), (-0.96, -1.42), (-0.44, -1.02), (0, -1.52), (0.44, -1.02), (0.96, -1.42),
                   (0.82, -0.50))), colour, "headwear")
        for x, y in ((-0.94, -1.40), (0, -1.46), (0.94, -1.40)):
            cut(head.ellipse(x, y + raised, 0.14, 0.14), mix(colour, WHITE, 0.6), "headwear", inked=False)
        cut(head.ellipse(0, -0.78 + raised, 0.19, 0.17), dark, "headwear", inked=False)


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
