"""Keypoints and boxes as other nodes, pose editors and programs write them, in ComfyUI's form and in pixels.

ComfyUI's POSE_KEYPOINT is a list of frames, each with canvas_width, canvas_height and people, whose parts are flat
lists [x, y, score, ...]. Its BOUNDING_BOX is a dictionary of x, y, width and height, a list of them, or one list per
picture.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

BODY = "pose_keypoints_2d"
_ENDING = "_keypoints_2d"
_BODY_POINTS = 18
# OpenPose's own default also has the middle of the hips, which nothing draws, as point 8, and the feet at the end.
_BODY_25, _MIDDLE_OF_HIPS, _FEET = 25, 8, 19
_LARGEST_FRACTION = 2.0  # a coordinate up to this is a fraction of the picture; limbs may end outside it
_FRAME = (
    "connect frames of keypoints from SDPose Keypoint Extractor or a pose editor, "
    "[{canvas_width, canvas_height, people: [{pose_keypoints_2d: [x, y, score, ...]}]}], also as JSON text"
)
_BOX = "connect a face detector's boxes: {x, y, width, height} in pixels, or numbers left, top, right, bottom"


def frames(value: Any, name: str) -> list[dict]:
    """The frames of POSE_KEYPOINT, a copy, its parts flat lists in pixels or empty; a missing point has score 0.

    value: frames or one of them, as objects, arrays or JSON text; points flat or nested, with or without a score,
    or null; coordinates in pixels or in fractions of the canvas. Raises ValueError, naming the input.
    """
    value = _plain(value, name, _FRAME)
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list):
        raise ValueError(f"{name} are {_shown(value)}: {_FRAME}")
    listed = [frame for part in listed for frame in (part if isinstance(part, list) else [part])]
    return [_frame(frame, f"{name}, frame {i + 1}" if len(listed) > 1 else name) for i, frame in enumerate(listed)]


def boxes(value: Any, name: str) -> list[list[dict[str, float]]]:
    """Boxes {x, y, width, height}: one list per picture, or a single one for all.

    value: ComfyUI's, or numbers left, top, right and bottom, [4], [N, 4] or [pictures, N, 4]; as objects, arrays or
    JSON text. Raises ValueError, naming the input.
    """
    value = _plain(value, name, _BOX)
    if isinstance(value, list) and not all(map(_is_box, value)) and not _is_numbers(value):
        return [_of_picture(entry, name) for entry in value]
    return [_of_picture(value, name)]


def in_pixels(box: Mapping[str, float], width: int, height: int) -> dict[str, float]:
    """A box in pixels of a picture of this size; one that lies within 0..1 is in fractions of it."""
    if max(box["x"] + box["width"], box["y"] + box["height"]) > 1 or min(box["x"], box["y"]) < 0:
        return dict(box)
    sides = {"x": width, "width": width, "y": height, "height": height}
    return {key: round(box[key] * side, 3) for key, side in sides.items()}  # fractions of fp32 are as exact


def _plain(value: Any, name: str, expected: str) -> Any:
    """Lists and dictionaries of JSON text, and of arrays and tensors anywhere in them."""
    try:
        return _lists(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} are text that is not valid JSON ({error}): {expected}") from error


def _lists(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


# Keypoints


def _frame(frame: Any, name: str) -> dict:
    if not isinstance(frame, Mapping):
        raise ValueError(f"{name} are {_shown(frame)}: {_FRAME}")
    frame = dict(frame)
    if "people" not in frame and isinstance(frame.get("keypoints"), list):  # the first pose editors' form
        frame["people"] = [{BODY: body} for body in frame.pop("keypoints")]
        frame |= {f"canvas_{side}": frame.pop(side) for side in ("width", "height") if side in frame}
    people = frame.get("people")
    if not people:
        return frame
    if not isinstance(people, list) or not all(isinstance(person, Mapping) for person in people):
        raise ValueError(f"{name}: people are {_shown(people)}: {_FRAME}")
    frame["people"] = people = [
        {key: _points(part, f"{name}: {key}") if key.endswith(_ENDING) else part for key, part in person.items()}
        for person in people
    ]
    for person in people:
        if len(body := person.get(BODY, [])) == 3 * _BODY_25:
            person.setdefault(f"foot{_ENDING}", body[3 * _FEET :])
            person[BODY] = body[: 3 * _MIDDLE_OF_HIPS] + body[3 * _MIDDLE_OF_HIPS + 3 : 3 * _FEET]
    parts = [part for person in people for key, part in person.items() if key.endswith(_ENDING)]
    places = [part[i + axis] for part in parts for i in range(0, len(part), 3) if part[i + 2] for axis in (0, 1)]
    if any(places) and max(map(abs, places)) <= _LARGEST_FRACTION:
        size = [frame.get(f"canvas_{side}") for side in ("width", "height")]
        if not all(_is_number(side) and side > 0 for side in size):
            raise ValueError(
                f"{name} are in fractions of the picture, 0 to 1, without its canvas_width and canvas_height: add "
                "them, in pixels"
            )
        for part in parts:
            part[0::3], part[1::3] = ([n * side for n in part[axis::3]] for axis, side in enumerate(size))
    return frame


def _points(part: Any, name: str) -> list[float]:
    """[x, y, score, ...] of a part; no point where it is null."""
    if part is None:
        return []
    if not isinstance(part, list):
        raise ValueError(f"{name} is {_shown(part)}: {_FRAME}")
    if any(isinstance(point, list) for point in part):
        points = [[] if point is None else point for point in part]
    else:
        step = 2 if len(part) == 2 * _BODY_POINTS else 3  # 12 points of a body there are not
        if len(part) % step:
            raise ValueError(f"{name} has {len(part)} numbers, where x, y and score of each point are expected")
        points = [part[i : i + step] for i in range(0, len(part), step)]
    return [number for point in points for number in _point(point, name)]


def _point(point: Any, name: str) -> tuple[float, float, float]:
    if not isinstance(point, list) or len(point) not in (0, 2, 3) or not all(
        number is None or _is_number(number) for number in point
    ):
        raise ValueError(f"{name} has the point {_shown(point)}, where x, y and score are expected")
    numbers = [math.nan if number is None else float(number) for number in point]
    if not numbers or not all(map(math.isfinite, numbers)):
        return 0.0, 0.0, 0.0
    x, y, *score = numbers
    return x, y, score[0] if score else float(bool(x or y))


# Boxes


def _of_picture(value: Any, name: str) -> list[dict[str, float]]:
    if value is None:
        return []
    if _is_box(value):
        return [_box(value, name)]
    if not isinstance(value, list):
        raise ValueError(f"{name} hold {_shown(value)}: {_BOX}")
    return [_box(entry, name) for entry in value if entry is not None]


def _is_box(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_numbers(value)


def _box(box: Any, name: str) -> dict[str, float]:
    keys = ("x", "y", "width", "height")
    if isinstance(box, Mapping):
        numbers = [box.get(key) for key in keys]
        if not all(map(_is_number, numbers)):
            raise ValueError(f"{name} hold no x, y, width and height: {_BOX}")
    elif _is_numbers(box) and len(box) in (4, 5):  # detectors append the score
        left, top, right, bottom = box[:4]
        if right < left or bottom < top:
            raise ValueError(f"{name} hold {box}, whose right or bottom comes before its left or top: {_BOX}")
        numbers = [left, top, right - left, bottom - top]
    else:
        raise ValueError(f"{name} hold {_shown(box)}: {_BOX}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} hold NaN or infinite values: {_BOX}")
    return dict(zip(keys, map(float, numbers), strict=True))
