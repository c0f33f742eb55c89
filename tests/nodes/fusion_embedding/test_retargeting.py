"""Body proportions on skeletons whose true limb lengths are known."""

import copy
import json
import math

import pytest
from comfy_extras.nodes_sdpose import SDPoseDrawKeypoints
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.fusion_embedding.config import RetargetConfig
from pack.nodes.fusion_embedding.method import FusionError
from pack.nodes.fusion_embedding.nodes import UnderstudyRetargetPose
from pack.nodes.fusion_embedding.retargeting import retarget

LENGTHS = {"neck": 30, "shoulder": 25, "torso": 80, "upper arm": 40, "forearm": 35, "thigh": 60, "shin": 55,
           "eye": 8, "ear": 6}
LIMBS = [(1, 0, "neck"), (1, 2, "shoulder"), (1, 5, "shoulder"), (1, 8, "torso"), (1, 11, "torso"),
         (2, 3, "upper arm"), (5, 6, "upper arm"), (3, 4, "forearm"), (6, 7, "forearm"), (8, 9, "thigh"),
         (11, 12, "thigh"), (9, 10, "shin"), (12, 13, "shin"), (0, 14, "eye"), (0, 15, "eye"), (14, 16, "ear"),
         (15, 17, "ear")]
STANDING = {0: -90, 2: 180, 5: 0, 8: 100, 11: 80, 3: 120, 6: 60, 4: 110, 7: 70, 9: 95, 12: 85, 10: 90, 13: 90,
            14: -140, 15: -40, 16: 180, 17: 0}


def skeleton(lengths=LENGTHS, angles=STANDING, scale=1.0, missing=(), neck=(200.0, 150.0)):
    points = {1: neck}
    for a, b, limb in LIMBS:
        turn = math.radians(angles[b])
        x, y = points[a]
        points[b] = (x + scale * lengths[limb] * math.cos(turn), y + scale * lengths[limb] * math.sin(turn))
    flat = [v for i in range(18) for v in (*points[i], 0.1 if i in missing else 0.9)]
    hand = [v for dx in range(21) for v in (points[4][0] + dx, points[4][1], 0.9)]
    feet = [v for joint in (13, 13, 13, 10, 10, 10) for v in (points[joint][0], points[joint][1] + 3, 0.9)]
    person = {"pose_keypoints_2d": flat, "hand_right_keypoints_2d": hand, "foot_keypoints_2d": feet,
              "hand_left_keypoints_2d": 21 * [*points[7], 0.9], "face_keypoints_2d": 70 * [*points[0], 0.9]}
    return [{"canvas_width": 400, "canvas_height": 500, "people": [person]}]


def points(frames, key="pose_keypoints_2d"):
    flat = frames[0]["people"][0][key]
    return [tuple(flat[i : i + 2]) for i in range(0, len(flat), 3)]


def measured(frames):
    at = points(frames)
    return {(a, b): math.dist(at[a], at[b]) for a, b, _ in LIMBS}


def test_the_source_s_proportions_on_the_pose_s_directions():
    child = {**LENGTHS, "thigh": 40, "shin": 36, "upper arm": 30, "neck": 40}
    waving = {**STANDING, 3: -20, 4: -80, 10: 120}
    pose, source = skeleton(LENGTHS, waving), skeleton(child, STANDING, scale=1.7)
    before = copy.deepcopy((pose, source))
    actual = retarget(pose, source, RetargetConfig())
    assert (pose, source) == before
    for a, b, limb in LIMBS:
        # The torso stays the pose's, so the source's scale does not count.
        assert measured(actual)[a, b] == pytest.approx(child[limb]), limb
        at = points(actual)
        turned = math.degrees(math.atan2(at[b][1] - at[a][1], at[b][0] - at[a][0]))
        assert (turned - waving[b] + 180) % 360 - 180 == pytest.approx(0, abs=1e-6)
    lowest = [max(points(frames)[i][1] for i in (10, 13)) for frames in (pose, actual)]
    assert lowest[0] == pytest.approx(lowest[1])


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0.6, 1.6))
def test_amount_goes_from_nothing_to_all(amount, factor):
    pose, source = skeleton(), skeleton({**LENGTHS, "shin": 55 * factor})
    actual = measured(retarget(pose, source, RetargetConfig(amount)))
    assert actual[9, 10] == pytest.approx(55 * factor**amount)
    assert actual[2, 3] == pytest.approx(40)


def test_hands_and_feet_keep_their_place_next_to_their_joints():
    source = skeleton({**LENGTHS, "forearm": 50, "shin": 30})
    actual, pose = retarget(skeleton(), source, RetargetConfig()), skeleton()
    for frames in (actual, pose):
        wrist = points(frames)[4]
        assert [(x - wrist[0], y - wrist[1]) for x, y in points(frames, "hand_right_keypoints_2d")] == [
            pytest.approx((dx, 0), abs=1e-9) for dx in range(21)
        ]
        ankle = points(frames)[10]
        assert points(frames, "foot_keypoints_2d")[5] == pytest.approx((ankle[0], ankle[1] + 3))


def test_a_limb_that_points_at_the_camera_is_no_short_limb():
    """The longest of both sides, and of all frames."""
    seen = skeleton()
    seen[0]["people"][0]["pose_keypoints_2d"][3 * 4] = points(seen)[3][0] + 1  # the right forearm is foreshortened
    actual = measured(retarget(skeleton(), seen, RetargetConfig()))
    assert actual[3, 4] == pytest.approx(35) and actual[6, 7] == pytest.approx(35)


def test_wrongly_found_joints_draw_no_giant():
    giant = skeleton({**LENGTHS, "forearm": 900})
    assert measured(retarget(skeleton(), giant, RetargetConfig()))[3, 4] == pytest.approx(70)


def test_points_that_were_not_found_move_along_and_stay_not_found():
    pose = skeleton(missing=(4, 10, 13))
    actual = retarget(pose, skeleton({**LENGTHS, "upper arm": 60}), RetargetConfig())
    at, before = points(actual), points(pose)
    moved = [at[3][i] - before[3][i] for i in range(2)]
    assert math.hypot(*moved) > 10
    assert [at[4][i] - before[4][i] for i in range(2)] == pytest.approx(moved)
    assert actual[0]["people"][0]["pose_keypoints_2d"][14] == 0.1


@pytest.mark.parametrize("broken", ["pose", "source"])
def test_nobody_is_an_error_that_names_the_input(broken):
    frames = {"pose": skeleton(), "source": skeleton()}
    words = "source_keypoints hold no person" if broken == "source" else "keypoints hold no person"
    for bad in ([], [{"canvas_width": 4, "canvas_height": 4, "people": []}], skeleton(missing=(8, 11))):
        with pytest.raises(FusionError, match=words):
            retarget(*({**frames, broken: bad}.values()), RetargetConfig())
    frames[broken] = [{"canvas_width": 4, "canvas_height": 4, "people": [{"pose_keypoints_2d": [1.0] * 60}]}]
    with pytest.raises(FusionError, match="20 points"):
        retarget(*frames.values(), RetargetConfig())


def test_those_without_a_body_are_nobody_and_stay():
    """As detectors list the hands and faces of people who are cut off."""
    face = {"pose_keypoints_2d": [], "face_keypoints_2d": [1.0, 2.0, 0.9]}
    frame, = skeleton()
    crowded = [{**frame, "people": [face, *frame["people"]]}, {**frame, "people": None}, {"canvas_width": 4}]
    child = skeleton({**LENGTHS, "shin": 40})
    actual = retarget(crowded, crowded[1:] + child, RetargetConfig())
    assert actual[0]["people"] == [face, *retarget(skeleton(), child, RetargetConfig())[0]["people"]]
    assert actual[1:] == crowded[1:]


def test_comfyui_draws_what_the_node_gives():
    (frames,) = UnderstudyRetargetPose.execute(skeleton(), skeleton({**LENGTHS, "shin": 20}), 1.0).result
    pictures = [
        SDPoseDrawKeypoints.execute(keypoints, True, True, True, True, 4, 3, 0.3, True).result[0]
        for keypoints in (frames, skeleton())
    ]
    assert pictures[0].shape == (1, 500, 400, 3)
    assert pictures[0].amax() > 0.5 and (pictures[0] - pictures[1]).abs().max() > 0.5


def in_fractions(frames):
    """The same keypoints as fractions of a canvas that is not square."""
    frames = copy.deepcopy(frames)
    for person in frames[0]["people"]:
        for flat in person.values():
            flat[0::3], flat[1::3] = [x / 400 for x in flat[0::3]], [y / 500 for y in flat[1::3]]
    return frames


def test_keypoints_in_fractions_are_measured_in_pixels():
    child = skeleton({**LENGTHS, "upper arm": 70})
    expected = retarget(skeleton(), child, RetargetConfig())
    assert measured(expected)[2, 3] == pytest.approx(70)
    for pose, source in ((in_fractions(skeleton()), child), (skeleton(), in_fractions(child)),
                         (json.dumps(in_fractions(skeleton())[0]), json.dumps(in_fractions(child)))):
        for point, wanted in zip(points(retarget(pose, source, RetargetConfig())), points(expected), strict=True):
            assert point == pytest.approx(wanted)


def test_someone_without_hips_in_front_does_not_hide_the_next():
    child = skeleton({**LENGTHS, "shin": 30})
    cut_off = skeleton({**LENGTHS, "shin": 90}, missing=(8, 11))[0]["people"]
    crowd = [{**child[0], "people": cut_off + child[0]["people"]}]
    assert retarget(skeleton(), crowd, RetargetConfig()) == retarget(skeleton(), child, RetargetConfig())


def test_bodies_without_hands_and_faces_can_be_drawn():
    """As pose editors write them."""
    frame, = skeleton()
    for part in (None, []):
        person = {"pose_keypoints_2d": frame["people"][0]["pose_keypoints_2d"], "face_keypoints_2d": part}
        (frames,) = UnderstudyRetargetPose.execute({**frame, "people": [person]}, skeleton(), 1.0).result
        picture = SDPoseDrawKeypoints.execute(frames, True, True, True, True, 4, 3, 0.3, True).result[0]
        assert picture.shape == (1, 500, 400, 3) and picture.amax() > 0.5
