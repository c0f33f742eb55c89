"""Keypoints and boxes in every form that editors, detectors and other nodes write."""

import copy
import json
import math

import numpy
import pytest
import torch
from pack.nodes.inputs import keypoints

# 18 points, the last of which is missing; exact in binary, so that fractions of 512 x 1024 come back to the bit.
POINTS = [(16.0 * i, 32.0 * i + 8) for i in range(1, 18)]
FLAT = [number for x, y in POINTS for number in (x, y, 1.0)] + [0.0, 0.0, 0.0]
SIZE = {"canvas_width": 512, "canvas_height": 1024}
BODY = "pose_keypoints_2d"
FRAME = {**SIZE, "people": [{BODY: FLAT, "face_keypoints_2d": []}]}


def frame(body, **changes):
    return {**SIZE, "people": [{BODY: body, "face_keypoints_2d": None}], **changes}


FRACTIONS = [n / side for i in range(0, 54, 3) for n, side in zip(FLAT[i : i + 3], (512, 1024, 1), strict=True)]
FORMS = {
    "ComfyUI's": [FRAME],
    "one frame": FRAME,
    "JSON of frames": json.dumps([FRAME]),
    "JSON of one frame": json.dumps(FRAME),
    "a list of lists": [[FRAME]],
    "a tuple": (FRAME,),
    "nested points": [frame([*([x, y, 1] for x, y in POINTS), [0, 0, 0]])],
    "nested without scores": [frame([*([x, y] for x, y in POINTS), [0, 0]])],
    "null for a point": [frame([*([x, y, 1.0] for x, y in POINTS), None])],
    "null for its numbers": [frame([*FLAT[:51], None, None, None])],
    "not a number": [frame([*FLAT[:51], math.nan, math.nan, 0.9])],
    "pairs": [frame([number for x, y in POINTS for number in (x, y)] + [0, 0])],
    "an array": [frame(numpy.array(FLAT).reshape(18, 3))],
    "a tensor": [frame(torch.tensor(FLAT))],
    "fractions": [frame(FRACTIONS)],
    "JSON of fractions": json.dumps(frame(FRACTIONS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_comfyui_s_in_pixels(form):
    before = copy.deepcopy(FORMS[form])
    assert keypoints.frames(FORMS[form], "keypoints") == [FRAME]
    assert str(FORMS[form]) == str(before)


def test_the_first_editors_form_has_keypoints_in_place_of_people():
    value = {"width": 512, "height": 1024, "keypoints": [[*([x, y] for x, y in POINTS), None]]}
    assert keypoints.frames(json.dumps(value), "keypoints") == [{**SIZE, "people": [{BODY: FLAT}]}]


def test_openpose_s_25_points_are_its_18_and_the_feet():
    """Its default lists nose, neck, arms, the middle of the hips, legs, eyes, ears, and three points of each foot."""
    middle, feet = [200.0, 300.0, 0.5], [float(i) for i in range(100, 118)]
    body = FLAT[: 8 * 3] + middle + FLAT[8 * 3 :] + feet
    person = {BODY: FLAT, "face_keypoints_2d": [], "foot_keypoints_2d": feet}
    assert keypoints.frames(frame(body), "keypoints") == [{**SIZE, "people": [person]}]


def test_fractions_are_told_by_all_people_and_parts_of_a_frame():
    """A hand in the corner of a picture is not in fractions, and a limb may leave the picture."""
    hand = [0.5, 0.5, 1.0]
    (pixels,) = keypoints.frames(frame(FLAT, people=[{BODY: FLAT}, {"hand_left_keypoints_2d": hand}]), "keypoints")
    assert pixels["people"][1]["hand_left_keypoints_2d"] == hand
    (pixels,) = keypoints.frames(frame([1.25, -0.5, 1.0, 0.5, 0.5, 1.0]), "keypoints")
    assert pixels["people"][0][BODY] == [640.0, -512.0, 1.0, 256.0, 512.0, 1.0]
    for unchanged in ([{**SIZE, "people": None}], [{"canvas_width": 4}], [{**SIZE, "people": []}]):
        assert keypoints.frames(unchanged, "keypoints") == unchanged


@pytest.mark.parametrize(("value", "named"), [
    (None, "None"), (7, "7"), ("a pose", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ([1, 2], "1"),
    (["people"], "people"), ([{"people": 3}], "3"), ([{"people": ["Ann"]}], "Ann"), (frame("text"), "text"),
    (frame([1.0, 2.0]), "2 numbers"),
    (frame([[1.0]]), "1.0"), (frame([[1.0, "2", 3]]), "2"), (frame([1.0, 2.0, True]), "True"),
    ({"people": [{BODY: FRACTIONS}]}, "canvas_width"), (frame(FRACTIONS, canvas_width=None), "canvas_width"),
    (torch.zeros(1, 18, 3), "0.0"),
])
def test_what_is_not_keypoints_is_named_with_what_is_expected(value, named):
    with pytest.raises(ValueError, match=f"^source_keypoints.*{named}") as error:
        keypoints.frames(value, "source_keypoints")
    assert len(str(error.value)) < 400


BOX = {"x": 40.0, "y": 25.0, "width": 20.0, "height": 10.0}
CORNERS = [40.0, 25.0, 60.0, 35.0]


@pytest.mark.parametrize("value", [
    BOX, [BOX], [[BOX]], (BOX,), json.dumps(BOX), json.dumps([[BOX]]), CORNERS, [CORNERS], [[CORNERS]],
    torch.tensor(CORNERS), torch.tensor([CORNERS]), torch.tensor([[CORNERS]]), [torch.tensor([CORNERS])],
    numpy.array([CORNERS]), json.dumps(CORNERS), [*CORNERS, 0.99], torch.tensor([[*CORNERS, 0.5]]), [[None, BOX]],
])
def test_boxes_in_every_form(value):
    assert keypoints.boxes(value, "bboxes") == [[BOX]]


@pytest.mark.parametrize(("value", "expected"), [
    (None, [[]]), ([], [[]]), ([[]], [[]]), ([None, [BOX]], [[], [BOX]]), ([None], [[]]), (torch.zeros(0, 4), [[]]),
    ([BOX, BOX], [[BOX, BOX]]), (torch.tensor([CORNERS, CORNERS]), [[BOX, BOX]]),
    (torch.tensor([[CORNERS], [CORNERS]]), [[BOX], [BOX]]), ([BOX, [BOX]], [[BOX], [BOX]]),
])
def test_boxes_of_pictures_and_none(value, expected):
    assert keypoints.boxes(value, "bboxes") == expected


@pytest.mark.parametrize("value", [
    7, "box", [1, 2, 3], {"x": 1}, [["a"]], [60, 35, 40, 25], [[BOX, 7]], {**BOX, "x": "1"}, {**BOX, "x": math.nan},
    torch.full((1, 4), math.nan),
])
def test_what_is_no_box_is_named_with_what_is_expected(value):
    with pytest.raises(ValueError, match="^bboxes .*left, top, right, bottom"):
        keypoints.boxes(value, "bboxes")


def test_boxes_in_fractions_are_those_of_the_picture():
    box = {"x": 0.25, "y": 0.5, "width": 0.5, "height": 0.25}
    assert keypoints.in_pixels(box, 400, 200) == {"x": 100.0, "y": 100.0, "width": 200.0, "height": 50.0}
    for pixels in (BOX, {"x": 0.5, "y": 0.5, "width": 3, "height": 3}, {**box, "x": -1.0}):
        assert keypoints.in_pixels(pixels, 400, 200) == pixels
