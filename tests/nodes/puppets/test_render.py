"""Drawing: what the pictures, part maps and joints promise."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.puppets import actions, config, render, world

POSES = list(itertools.product(config.ACTIONS, config.SPECIES))
SEEDS = st.integers(0, 2**31 - 1)


def puppet(species: str, **changes) -> config.Identity:
    return dataclasses.replace(world.identity_from_words(f"red {species} with blue trousers"), **changes)


def digest(picture: config.Picture) -> str:
    content = picture.image.tobytes() + picture.parts.tobytes() + picture.joints.tobytes()
    return hashlib.sha256(content).hexdigest()


@given(SEEDS)
@settings(max_examples=15)
def test_a_take_has_one_picture(seed):
    take = world.sample_take(seed)
    assert digest(render.render(take)) == digest(render.render(dataclasses.replace(take)))


@given(SEEDS, st.sampled_from([64, 128, 200]))
@settings(max_examples=15)
def test_picture_parts_and_joints_agree(seed, size):
    picture = render.render(world.sample_take(seed), size)
    assert picture.image.shape == (size, size, 3) and picture.image.dtype == np.uint8
    assert picture.parts.shape == (size, size) and picture.parts.max() < len(config.PART_NAMES)
    assert picture.joints.shape == (18, 3) and picture.joints.dtype == np.float32
    assert (picture.mask == (picture.parts != 0)).all()
    assert 0.04 < picture.mask.mean() < 0.45
    rows, columns = np.nonzero(picture.mask)
    assert np.ptp(rows) > 0.3 * size and np.ptp(columns) > 0.15 * size
    # Joints lie on the puppet: shoulders, hips, knees, nose and eyes always do.
    for x, y, _ in picture.joints[[0, 2, 5, 8, 9, 11, 12, 14, 15]]:
        assert picture.mask[int(y), int(x)]


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_every_joint_is_inside_the_frame(scale):
    for i, (action, species) in enumerate(POSES):
        for phase, mirrored in ((0.0, False), (0.3, True), (0.7, False)):
            take = config.Take(puppet(species), action, phase, mirrored, scale=scale, dx=(-0.12, 0.12)[i % 2],
                               dy=-0.04, seed=i)
            unit, x, y = render.placement(take)
            joints = actions.pose(action, phase, species, i, mirrored) * unit + (x, y)
            assert joints.min() >= 0 and joints.max() < 1, (action, species)


@pytest.mark.parametrize("part", ["torso", "headwear", "right_leg", "left_leg"])
def test_part_map_finds_the_colour_of_its_part(part):
    colours = {"torso": (0.85, 0.16, 0.16), "headwear": (0.5, 0.23, 0.68), "right_leg": (0.18, 0.35, 0.82),
               "left_leg": (0.98, 0.83, 0.2)}
    who = puppet("bear", headwear="top hat", headwear_colour=colours["headwear"], detail="odd_trousers",
                 detail_colour=colours["left_leg"])
    picture = render.render(config.Take(who, "standing", scene="city"))
    tint = np.array(render.TINTS["city"])
    found = np.median(picture.image[picture.parts == config.PART_NAMES.index(part)], 0) / 255
    assert np.abs(found - np.array(colours[part]) * tint).max() < 0.02


def test_every_part_occurs():
    seen = set()
    for seed in range(60):
        seen |= set(np.unique(render.render(world.sample_take(seed)).parts).tolist())
    assert seen == set(range(len(config.PART_NAMES)))


@pytest.mark.parametrize("action", config.ACTIONS)
def test_mirrored_joints_mirror(action):
    plain, mirrored = (actions.pose(action, 0.37, "cat", 5, flip) for flip in (False, True))
    other = {"r_": "l_", "l_": "r_"}
    swap = [config.JOINTS.index(other.get(name[:2], name[:2]) + name[2:]) for name in config.JOINTS]
    np.testing.assert_allclose(mirrored, plain[swap] * (-1, 1), atol=1e-12)


def test_mirroring_flips_the_action_not_what_is_worn():
    who = puppet("cat", detail="odd_trousers", detail_colour=(0.98, 0.83, 0.2))
    for mirrored in (False, True):
        picture = render.render(config.Take(who, "pointing", mirrored=mirrored))
        left_leg = np.nonzero(picture.parts == config.PART_NAMES.index("left_leg"))[1].mean()
        right_leg = np.nonzero(picture.parts == config.PART_NAMES.index("right_leg"))[1].mean()
        assert right_leg < left_leg  # the puppet faces us: its right is at our left
        yellow = np.median(picture.image[picture.parts == config.PART_NAMES.index("left_leg")], 0)
        assert yellow[0] > 180 and yellow[2] < 80


def test_mean_poses_are_far_apart():
    def mean(action):
        return np.mean([actions.pose(action, i / 16, "person", -1) for i in range(16)], 0)

    def distance(a, b):
        """How far the joint moves that moves most, sides and mirror images taken as equal."""
        return min(np.linalg.norm(a - c, axis=1).max() for c in (b, b[list(config.MIRROR)] * (-1, 1)))

    means = {action: mean(action) for action in config.ACTIONS}
    spread = {(a, b): distance(means[a], means[b]) for a, b in itertools.combinations(config.ACTIONS, 2)}
    closest = min(spread, key=spread.get)
    assert spread[closest] > 0.1, (closest, spread[closest])  # of the puppet's height; jitter moves 0.02


@pytest.mark.parametrize("action", config.ACTIONS)
def test_cycles_close_and_are_smooth(action):
    steps = 64
    cycle = np.stack([actions.pose(action, i / steps, "fox", 2) for i in range(steps + 1)])
    np.testing.assert_allclose(cycle[0], cycle[-1], atol=1e-9)
    speed = np.linalg.norm(np.diff(cycle, axis=0), axis=-1)
    assert speed.max() < 0.06
    assert np.ptp(cycle, axis=0).max() > 0.01


def test_limbs_keep_their_length():
    for action, species in POSES:
        poses = [actions.pose(action, phase, species, 9) for phase in (0.0, 0.4, 0.8)]
        for a, b in ((2, 3), (3, 4), (5, 6), (8, 9), (12, 13), (14, 15), (1, 8)):
            lengths = [math.dist(joints[a], joints[b]) for joints in poses]
            assert max(lengths) - min(lengths) < 1e-9


def test_clip_frames():
    take = world.sample_take(11)
    clip = render.render_clip(take, 8, 64)
    assert len(clip) == 8 and digest(clip[0]) == digest(render.render(take, 64))
    assert len({digest(frame) for frame in clip}) == 8
    assert {frame.caption for frame in clip} == {clip[0].caption}


@pytest.mark.parametrize("detail", config.DETAILS[1:])
@pytest.mark.parametrize("species", config.SPECIES)
def test_every_detail_shows(species, detail):
    plain, detailed = (render.render(config.Take(puppet(species, detail=d), "standing")).image.astype(int)
                       for d in ("none", detail))
    assert (np.abs(plain - detailed).max(-1) > 40).sum() >= 20


def test_group_shows_both_and_the_first_in_front():
    takes = [dataclasses.replace(world.sample_take(seed), action="starfish", scene="beach")
             for seed in (1, 2)]
    group = render.render_group(takes)
    empty = render.render_group(takes[:1])
    half = group.image.shape[1] // 2
    assert group.mask[:, :half].sum() > group.mask[:, half:].sum()
    assert (group.image[:, half:] != empty.image[:, half:]).any(-1).mean() > 0.1
    assert group.caption.startswith("a ") and " and a" in group.caption and group.caption.endswith("on a beach")
    with pytest.raises(ValueError, match="at least one"):
        render.render_group([])


def test_a_clip_of_a_group_is_its_pictures_through_the_cycle():
    takes = [dataclasses.replace(world.sample_take(seed), action="waving") for seed in (1, 2)]
    clip = render.render_group_clip(takes, 5, 64)
    later = [dataclasses.replace(take, phase=take.phase + 0.4) for take in takes]
    assert len(clip) == 5 and (clip[2].image == render.render_group(later, 64).image).all()


def test_pose_drawing_has_the_limb_where_the_joints_are():
    joints = np.zeros((18, 3), np.float32)
    joints[2], joints[3] = (20, 30, 1), (100, 30, 1)
    drawing = render.draw_pose(joints, 128)
    assert drawing.shape == (128, 128, 3) and drawing.dtype == np.uint8
    assert (drawing[30, 60] == [int(c * 0.6) for c in config.POSE_COLOURS[2]]).all()
    assert (drawing[30, 20] == config.POSE_COLOURS[2]).all()
    assert not drawing[60:].any() and not drawing[:4, :4].any()  # unseen joints are not drawn


@pytest.mark.parametrize("scene", config.SCENES)
def test_backdrops_differ_by_seed_and_stay_calm(scene):
    a, b = (render.backdrop(scene, seed, 128) for seed in (0, 1))
    assert a.shape == (128, 128, 3) and (a != b).any()
    steps = np.abs(np.diff(a.astype(int), axis=1)).max(-1)
    assert (steps > 24).mean() < 0.12
