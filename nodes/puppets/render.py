"""A take as a picture: puppet on backdrop, part map, joints and caption, all a function of the take."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from . import costumes
from .captions import caption, group_caption
from .config import ACTION_TABLE, LIGHTS, POSE_COLOURS, POSE_LIMBS, RGB, VIEWS, Identity, Picture, Take
from .paper import Frame, Paper, capsule, mix, shade
from .scenes import TINTS, backdrop
from .skeleton import BODIES, EYES, extent, hat_lift, pose

_UNIT = {"full": 0.705, "close_up": 1.0}  # of puppet space, as a fraction of the frame: full figures stand 0.8 high
_PEN = {"full": 1.0, "close_up": 1.4}
_GROUND = 0.93  # where the ground lies in the frame
_MARGIN = 0.02  # kept free at the edges of the frame
_SHOE: RGB = (0.30, 0.22, 0.22)
_SHADOW = 0.30


def placement(take: Take) -> tuple[float, float, float]:
    """(unit, x, y of puppet space's origin) in a frame of size 1, constant over the action's cycle."""
    left, top, right, bottom = extent(take.action, take.identity.species, take.mirrored, take.framing)
    shift, scale = VIEWS[take.framing][take.view]
    close = take.framing == "close_up"
    left, right, top = left - 0.06, right + 0.06, top - 0.02
    bottom = bottom if close else max(bottom, 0.0) + 0.02
    unit = min(_UNIT[take.framing] * scale * take.scale, (1 - 2 * _MARGIN) / (right - left))
    if close:
        x, y = 0.5 + shift + take.dx, 1 + take.dy - unit * bottom
    else:
        unit = min(unit, (1 - 2 * _MARGIN) / (bottom - top))
        x, y = 0.5 + shift + take.dx - unit * (left + right) / 2, _GROUND + take.dy
        y -= max(0.0, (y + unit * bottom) - (1 - _MARGIN))
    x += max(0.0, _MARGIN - (x + unit * left)) - max(0.0, (x + unit * right) - (1 - _MARGIN))
    y += max(0.0, _MARGIN - (y + unit * top))
    return unit, x, y


def _joints(take: Take, phase: float) -> np.ndarray:
    unit, x, y = placement(take)
    who = take.identity
    return pose(take.action, phase, who.species, take.seed, take.mirrored, take.framing) * unit + (x, y)


def _draw_puppet(paper: Paper, joints: np.ndarray, unit: float, take: Take, phase: float) -> None:
    """Draw from the joints (in canvas pixels); `unit` is the pixels of one unit of puppet space."""
    who = take.identity
    body = BODIES[who.species]
    j = [tuple(p) for p in joints.tolist()]
    neck = j[1]
    hip = ((j[8][0] + j[11][0]) / 2, (j[8][1] + j[11][1]) / 2)
    spine = math.atan2(hip[1] - neck[1], hip[0] - neck[0]) - math.pi / 2
    half = max(math.dist(j[2], j[5]) / 2 / unit, 0.095) + 0.004
    length = math.dist(neck, hip) / unit + 0.055
    torso = Frame(neck, unit, spine)
    centre = ((j[16][0] + j[17][0]) / 2, (j[16][1] + j[17][1]) / 2)
    angle = math.atan2(j[15][1] - j[14][1], j[15][0] - j[14][0])
    head = Frame(centre, unit * body.head, angle)
    eyes = ((j[14][0] + j[15][0]) / 2 - centre[0], (j[14][1] + j[15][1]) / 2 - centre[1])
    turn = round((eyes[0] * math.cos(angle) + eyes[1] * math.sin(angle)) / head.unit, 3)
    nod = round((eyes[1] * math.cos(angle) - eyes[0] * math.sin(angle)) / head.unit - EYES[1], 3)
    lift_x, lift_y, tip = hat_lift(take.action, phase, take.mirrored, take.framing)
    hat = Frame(head.at(0.25 * turn + lift_x, 0.3 * nod + lift_y), head.unit, angle + math.radians(tip))
    ears = Frame(head.at(-0.35 * turn, -0.3 * nod), head.unit, angle)

    far, near = ("l", "r") if turn >= 0 else ("r", "l")
    costumes.draw_tail(paper, Frame(hip, unit, spine), -1 if turn > 0 else 1, who)
    behind = ACTION_TABLE[take.action].arms_behind
    if behind:
        for side in (far, near):
            _draw_arm(paper, j, side, unit, who)
    elif abs(turn) > 0.12:
        _draw_arm(paper, j, far, unit, who, 0.88)
    for side in (far, near):
        _draw_leg(paper, j, side, unit, who, 0.88 if side == far and abs(turn) > 0.12 else 1.0)
    _draw_seat(paper, j, unit, who)
    costumes.draw_shirt(paper, torso, half, length, who)
    costumes.draw_ears(paper, ears, who)
    if who.species == "frog":  # its eyes sit on top of the head, before the hat
        costumes.draw_headwear(paper, hat, turn, who)
    costumes.draw_head(paper, head, turn, nod, who)
    if who.species != "frog":
        costumes.draw_headwear(paper, hat, turn, who)
    if who.detail == "scarf":
        costumes.draw_scarf(paper, torso, half, length, who)
    if not behind:
        for side in ((near,) if abs(turn) > 0.12 else (far, near)):
            _draw_arm(paper, j, side, unit, who)


def _cloth(who: Identity, side: str) -> RGB:
    return who.detail_colour if who.detail == "two_tone" and side == "l" else who.shirt


def _draw_arm(paper: Paper, j: list, side: str, unit: float, who: Identity, light: float = 1.0) -> None:
    shoulder, elbow, wrist = j[2:5] if side == "r" else j[5:8]
    arm, hand = ("right_arm", "right_hand") if side == "r" else ("left_arm", "left_hand")
    cloth = shade(_cloth(who, side), 0.94 * light)
    skin = shade(who.skin, light)
    reach = Frame(wrist, unit, math.atan2(wrist[1] - elbow[1], wrist[0] - elbow[0]))
    paper.cut(reach.ellipse(0.030, 0, 0.062, 0.056), skin, hand)
    paper.cut(capsule(elbow, wrist, 0.047 * unit, 0.042 * unit), cloth, arm)
    paper.cut(capsule(shoulder, elbow, 0.056 * unit, 0.047 * unit), cloth, arm)
    paper.cut(capsule(elbow, elbow, 0.040 * unit, 0.040 * unit), cloth, arm, inked=False)
    cuff = who.pattern_colour if who.pattern != "plain" else mix(cloth, (0, 0, 0), 0.25)
    paper.cut(reach.points(((-0.046, -0.045), (0.004, -0.045), (0.004, 0.045), (-0.046, 0.045))),
              shade(cuff, light), arm, inked=False)
    paper.brad(shoulder, arm)


def _draw_leg(paper: Paper, j: list, side: str, unit: float, who: Identity, light: float = 1.0) -> None:
    hip, knee, ankle = j[8:11] if side == "r" else j[11:14]
    leg = "right_leg" if side == "r" else "left_leg"
    colour = who.detail_colour if who.detail == "odd_trousers" and side == "l" else who.trousers
    cloth = shade(colour, light)
    shin = Frame(ankle, unit, math.atan2(ankle[1] - knee[1], ankle[0] - knee[0]) - math.pi / 2)
    toes = 1 if j[0][0] - (j[16][0] + j[17][0]) / 2 > 0.02 * unit else -1
    if abs(j[0][0] - (j[16][0] + j[17][0]) / 2) <= 0.02 * unit:
        toes = -1 if side == "r" else 1
    shoe = who.accent if who.species in ("penguin", "frog") else _SHOE
    paper.cut(shin.ellipse(0.022 * toes, 0.020, 0.068, 0.040), shade(shoe, light), "feet")
    paper.cut(capsule(knee, ankle, 0.055 * unit, 0.048 * unit), cloth, leg)
    paper.cut(capsule(hip, knee, 0.066 * unit, 0.055 * unit), cloth, leg)
    paper.cut(capsule(knee, knee, 0.047 * unit, 0.047 * unit), cloth, leg, inked=False)


def _draw_seat(paper: Paper, j: list, unit: float, who: Identity) -> None:
    right, left = j[8], j[11]
    middle = ((right[0] + left[0]) / 2, (right[1] + left[1]) / 2)
    other = who.detail_colour if who.detail == "odd_trousers" else who.trousers
    paper.cut(capsule(left, middle, 0.060 * unit, 0.060 * unit), other, "left_leg", inked=False)
    paper.cut(capsule(right, middle, 0.060 * unit, 0.060 * unit), who.trousers, "right_leg", inked=False)


def _cast(coverage: np.ndarray, size: int) -> np.ndarray:
    """The soft shadow that a sheet of this coverage casts to its lower right, float32 [H, W] in 0..1."""
    step, soft = max(1, round(size / 64)), max(1, round(size / 80))
    blurred = np.asarray(Image.fromarray(coverage).filter(ImageFilter.BoxBlur(soft)), dtype=np.float32) / 255
    shadow = np.zeros_like(blurred)
    shadow[step:, step:] = blurred[:-step, :-step]
    return shadow


def _contact(size: int, joints: np.ndarray, ground: float, unit: float) -> tuple[slice, slice, np.ndarray]:
    """The shadow on the ground below the puppet: a window and its strength, float [h, w]."""
    low, high = joints[:, 0].min(), joints[:, 0].max()
    x, rx, ry = (low + high) / 2, (high - low) / 2 + 0.05 * unit, 0.035 * unit
    rows = slice(max(0, int(ground - ry)), min(size, int(ground + ry) + 2))
    columns = slice(max(0, int(x - rx)), min(size, int(x + rx) + 2))
    v = (np.arange(rows.start, rows.stop)[:, None] + 0.5 - ground) / ry
    u = (np.arange(columns.start, columns.stop)[None] + 0.5 - x) / rx
    return rows, columns, np.clip(1 - u * u - v * v, 0, 1) * 0.42


def _factor(size: int) -> int:
    return 4 if size <= 160 else 3


def _compose(take: Take, phase: float, size: int, scene: np.ndarray) -> Picture:
    """`scene` is the backdrop as float32 [size, size, 3] in 0..255, before light and shadow."""
    unit, _, origin = placement(take)
    points = _joints(take, phase) * size
    paper = Paper(size, _factor(size), _PEN[take.framing])
    _draw_puppet(paper, points * paper.factor, unit * size * paper.factor, take, phase)
    colour, coverage, parts = paper.reduced()
    alpha = coverage.astype(np.float32) / 255
    dark = _cast(coverage, size) * np.float32(_SHADOW)
    if take.framing == "full":
        rows, columns, contact = _contact(size, points, origin * size, unit * size)
        dark[rows, columns] = np.maximum(dark[rows, columns], contact)
    ground = scene * (1 - dark)[..., None]
    image = ground * (1 - alpha)[..., None] + colour
    image *= np.array(TINTS[take.scene], dtype=np.float32) * np.array(LIGHTS[take.light], dtype=np.float32)
    inside = ((points >= 0) & (points < size)).all(1)
    joints = np.concatenate([points, inside[:, None]], 1).astype(np.float32)
    return Picture((np.clip(image, 0, 255) + 0.5).astype(np.uint8), parts, joints, caption(take))


def _scene(take: Take, size: int) -> np.ndarray:
    shift = VIEWS[take.framing][take.view][0] + take.dx
    return backdrop(take.scene, take.seed, size, 0.5 * shift).astype(np.float32)


def render(take: Take, size: int = 128) -> Picture:
    """Draw one take at `size` pixels square."""
    return _compose(take, take.phase, size, _scene(take, size))


def render_clip(take: Take, frames: int = 17, size: int = 128) -> list[Picture]:
    """One cycle of the action in `frames` pictures from the take's phase on; camera and scene stand still."""
    scene = _scene(take, size)
    return [_compose(take, take.phase + i / frames, size, scene) for i in range(frames)]


def render_group(takes: Sequence[Take], size: int = 128) -> Picture:
    """Several puppets side by side in the first take's scene and light; parts and joints are the first one's.

    Where two overlap, the first stands in front. Raises ValueError without takes.
    """
    if not takes:
        raise ValueError("a group needs at least one take")
    count = len(takes)
    spread = [(i - (count - 1) / 2) / count for i in range(count)]
    scene = _scene(takes[0], size)
    picture = None
    for take, dx in reversed(list(zip(takes, spread, strict=True))):
        room = (1.4 if take.framing == "full" else 1.1) / count
        placed = dataclasses.replace(take, view="centre", dx=dx, scale=take.scale * min(1.0, room),
                                     scene=takes[0].scene, light="day")
        picture = _compose(placed, take.phase, size, scene)
        scene = picture.image.astype(np.float32) / np.array(TINTS[takes[0].scene], dtype=np.float32)
    image = picture.image * np.array(LIGHTS[takes[0].light], dtype=np.float32)
    return Picture((image + 0.5).astype(np.uint8), picture.parts, picture.joints, group_caption(takes))


def render_group_clip(takes: Sequence[Take], frames: int = 17, size: int = 128) -> list[Picture]:
    """`render_group` in `frames` pictures, one cycle of each take's action from its own phase on."""
    moments = ([dataclasses.replace(take, phase=take.phase + i / frames) for take in takes] for i in range(frames))
    return [render_group(moment, size) for moment in moments]


def draw_pose(joints: np.ndarray, size: int) -> np.ndarray:
    """The OpenPose drawing of joints [18, 2 or 3] in pixels, uint8 [size, size, 3] on black."""
    factor = 4 if size <= 256 else 2
    sheet = Image.new("RGB", (size * factor, size * factor))
    draw = ImageDraw.Draw(sheet)
    seen = joints[:, 2] > 0 if joints.shape[1] > 2 else np.ones(len(joints), bool)
    points = [(float(x) * factor, float(y) * factor) for x, y in joints[:, :2]]
    width = size * factor / 128
    for (a, b), colour in zip(POSE_LIMBS, POSE_COLOURS, strict=False):
        if seen[a] and seen[b]:
            fill = tuple(int(c * 0.6) for c in colour)
            draw.polygon(capsule(points[a], points[b], 1.3 * width, 1.3 * width), fill)
    for (x, y), colour, there in zip(points, POSE_COLOURS, seen, strict=True):
        if there:
            r = 1.6 * width
            draw.ellipse((x - r, y - r, x + r, y + r), colour)
    return np.asarray(sheet.reduce(factor))
