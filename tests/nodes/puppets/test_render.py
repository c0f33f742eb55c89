"""Drawing: what the pictures, part maps and joints promise."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.puppets import config, render, skeleton, world

# Every (action, framing) that there is, and with every species.
ACTED = [(action, framing) for action, facts in config.ACTION_TABLE.items() for framing in facts.framings]
POSES = [(*acted, species) for acted in ACTED for species in config.SPECIES]
CLOSE_UPS = config.actions_of("close_up")
HEAD = [config.JOINTS.index(name) for name in ("nose", "neck", "r_shoulder", "l_shoulder", "r_eye", "l_eye", "r_ear",
                                               "l_ear")]
# The wrists by which a close-up acts, and elbows with them.
ACTING = {"waving": (6, 7), "cheering": (3, 4, 6, 7), "pointing": (6, 7), "raising hat": (3, 4), "saluting": (3, 4),
          "hugging": (4, 7), "flexing": (3, 4, 6, 7)}
SEEDS = st.integers(0, 2**31 - 1)


def puppet(species: str, **changes) -> config.Identity:
    return dataclasses.replace(world.identity_from_words(f"red {species} with blue trousers"), **changes)


def digest(picture: config.Picture) -> str:
    content = picture.image.tobytes() + picture.parts.tobytes() + picture.joints.tobytes()
    return hashlib.sha256(content).hexdigest()


def close_up(species: str, action: str, **changes) -> config.Take:
    return config.Take(puppet(species), action, **{"framing": "close_up", **changes})


@given(SEEDS, st.sampled_from(config.FRAMINGS))
@settings(max_examples=15)
def test_a_take_has_one_picture(seed, framing):
    take = world.sample_take(seed, framing=framing)
    assert digest(render.render(take)) == digest(render.render(dataclasses.replace(take)))


@given(SEEDS, st.sampled_from([64, 128, 200]), st.sampled_from(config.FRAMINGS))
@settings(max_examples=20)
def test_picture_parts_and_joints_agree(seed, size, framing):
    picture = render.render(world.sample_take(seed, framing=framing), size)
    assert picture.image.shape == (size, size, 3) and picture.image.dtype == np.uint8
    assert picture.parts.shape == (size, size) and picture.parts.max() < len(config.PART_NAMES)
    assert picture.joints.shape == (18, 3) and picture.joints.dtype == np.float32
    assert (picture.mask == (picture.parts != 0)).all()
    rows, columns = np.nonzero(picture.mask)
    if framing == "full":
        assert 0.04 < picture.mask.mean() < 0.45
        assert np.ptp(rows) > 0.3 * size and np.ptp(columns) > 0.15 * size
    else:
        assert 0.25 < picture.mask.mean() < 0.75
        assert np.ptp(rows) > 0.6 * size and np.ptp(columns) > 0.45 * size
        assert picture.mask[-1].any()  # the frame cuts the chest
    inside = (picture.joints[:, :2] >= 0).all(1) & (picture.joints[:, :2] < size).all(1)
    assert (picture.joints[:, 2] == inside).all()
    # Joints lie on the puppet: shoulders, hips, knees, nose and eyes always do.
    for x, y, seen in picture.joints[[0, 2, 5, 8, 9, 11, 12, 14, 15]]:
        assert picture.mask[int(y), int(x)] if seen else framing == "close_up"


@pytest.mark.parametrize("view", config.VIEW_NAMES)
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_joints_are_inside_the_frame(scale, view):
    for i, (action, framing, species) in enumerate(POSES):
        for phase, mirrored in ((0.0, False), (0.3, True), (0.5, False), (0.75, True)):
            take = config.Take(puppet(species), action, phase, mirrored, view=view, scale=scale,
                               dx=(-0.12, 0.12)[i % 2], dy=-0.04, seed=i, framing=framing)
            unit, x, y = render.placement(take)
            joints = skeleton.pose(action, phase, species, i, mirrored, framing) * unit + (x, y)
            if mirrored:
                joints = joints[list(config.MIRROR)]
            shown = joints if framing == "full" else joints[[*HEAD, *ACTING.get(action, ())]]
            assert shown.min() >= 0 and shown.max() < 1, (action, framing, species)


@pytest.mark.parametrize("action", CLOSE_UPS)
def test_no_close_up_is_cut_off_above_or_at_a_side(action):
    for i, species in enumerate(config.SPECIES):
        for phase in (0.0, 0.25, 0.5):
            take = close_up(species, action, phase=phase, mirrored=bool(i % 2), seed=i,
                            view=config.VIEW_NAMES[i % len(config.VIEW_NAMES)])
            mask = render.render(dataclasses.replace(take, identity=puppet(
                species, headwear=config.HEADWEAR[1 + i % 4]))).mask
            assert mask[0].sum() + mask[:, 0].sum() + mask[:, -1].sum() <= 12, (species, phase)


def test_proportions_at_the_resolution_of_the_models():
    for species in config.SPECIES:
        full = render.render(config.Take(puppet(species), "standing"))
        high = np.ptp(np.nonzero(full.mask)[0]) / 128
        assert 0.76 < high < (0.84 if species in ("person", "penguin") else 0.96), species  # others' ears are tall
        face = np.isin(full.parts, [config.PART_NAMES.index(part) for part in ("head", "face", "ears")])
        assert np.ptp(np.nonzero(face)[0]) > 0.42 * np.ptp(np.nonzero(full.mask)[0])
        near = render.render(close_up(species, "nodding"))
        face = np.isin(near.parts, [config.PART_NAMES.index(part) for part in ("head", "face", "ears")])
        assert np.ptp(np.nonzero(face)[0]) > 0.48 * 128 and np.ptp(np.nonzero(face)[1]) > 0.48 * 128


@pytest.mark.parametrize(("action", "framing"), [
    ("kicking", "close_up"), ("nodding", "full"), ("splits", "close_up"),
])
def test_a_framing_that_an_action_does_not_have_is_refused(action, framing):
    with pytest.raises(ValueError) as raised:
        config.Take(puppet("cat"), action, framing=framing)
    assert repr(action) in str(raised.value) and repr(framing) in str(raised.value)
    assert str(raised.value).endswith(", ".join(config.actions_of(framing)))


@pytest.mark.parametrize(("action", "framing", "message"), [
    ("flying", "full", "unknown action 'flying': choose one of standing, .*, nodding, .*, splits"),
    ("waving", "half", "unknown framing 'half': choose one of full, close_up"),
])
def test_unknown_actions_and_framings_are_refused(action, framing, message):
    with pytest.raises(ValueError, match=message):
        config.Take(puppet("cat"), action, framing=framing)


def opened(mask: np.ndarray, width: int) -> np.ndarray:
    """What is left of a mask that squares of `width` pixels can cover."""
    windows = np.lib.stride_tricks.sliding_window_view(mask, (width, width)).all((2, 3))
    kept = np.zeros_like(mask)
    for y, x in np.argwhere(windows):
        kept[y:y + width, x:x + width] = True
    return kept


@pytest.mark.parametrize(("size", "framing"), [(128, "full"), (96, "close_up")])
@pytest.mark.parametrize("pattern", config.PATTERNS[1:])
def test_patterns_have_few_large_cells(pattern, size, framing):
    who = puppet("bear", pattern=pattern, pattern_colour=config.COLOURS["white"])
    action = {"full": "standing", "close_up": "nodding"}[framing]
    picture = render.render(config.Take(who, action, framing=framing), size)
    torso = picture.parts == config.PART_NAMES.index("torso")
    light = np.array(render.TINTS["stage"]) * 255
    for colour in (who.shirt, who.pattern_colour):
        cells = torso & (np.abs(picture.image - np.array(colour) * light).max(-1) < 40)
        assert cells.sum() > 0.12 * torso.sum()
        assert (cells & opened(cells, 2)).sum() > 0.9 * cells.sum()
        assert opened(cells, 4).sum() > 0.5 * cells.sum()


@pytest.mark.parametrize("framing", config.FRAMINGS)
def test_light_is_a_colour_on_the_whole_picture_and_nothing_else(framing):
    day = dataclasses.replace(world.sample_take(4, framing=framing), light="day")
    bright = render.render(day)
    for light, factor in config.LIGHTS.items():
        lit = render.render(dataclasses.replace(day, light=light))
        assert (lit.parts == bright.parts).all() and (lit.joints == bright.joints).all()
        assert lit.caption == bright.caption
        assert np.abs(lit.image - np.clip(bright.image * np.array(factor), 0, 255)).max() <= 1.5
    factors = np.array(list(config.LIGHTS.values()))
    apart = np.abs(factors[:, None] - factors[None]).max(-1)
    assert apart[~np.eye(len(factors), dtype=bool)].min() > 0.1


@pytest.mark.parametrize(("action", "framing"), [("standing", "full"), ("nodding", "close_up")])
def test_a_view_moves_the_puppet_as_a_whole(action, framing):
    take = config.Take(puppet("cat"), action, framing=framing, seed=3)
    joints = {view: render.render(dataclasses.replace(take, view=view)).joints[:, :2] for view in config.VIEW_NAMES}
    centre = joints["centre"]
    for view, (shift, scale) in config.VIEWS[framing].items():
        grown = np.ptp(joints[view], axis=0) / np.ptp(centre, axis=0)
        np.testing.assert_allclose(grown, scale, atol=0.01)
        offset = (joints[view] - joints[view].mean(0)) - scale * (centre - centre.mean(0))
        assert np.abs(offset).max() < 0.05
        if scale == 1:
            assert abs((joints[view] - centre)[:, 0].mean() / 128 - shift) < 0.02


@pytest.mark.parametrize("framing", config.FRAMINGS)
def test_the_scene_changes_no_pixel_of_the_puppet(framing):
    take = dataclasses.replace(world.sample_take(8, framing=framing), light="day")
    first, second = (render.render(dataclasses.replace(take, scene=scene)) for scene in ("beach", "city"))
    assert (first.parts == second.parts).all() and (first.joints == second.joints).all()
    edges = np.pad(first.mask, 1, mode="edge")
    inner = np.lib.stride_tricks.sliding_window_view(edges, (3, 3)).all((2, 3))
    paper = [picture.image / np.array(render.TINTS[scene])
             for picture, scene in ((first, "beach"), (second, "city"))]
    assert np.abs(paper[0] - paper[1])[inner].max() < 6
    assert np.abs(paper[0] - paper[1])[~first.mask].mean() > 10


@pytest.mark.parametrize("frames", [9, 13])
@pytest.mark.parametrize("action", CLOSE_UPS)
def test_close_ups_move_visibly_between_frames(action, frames):
    for species in config.SPECIES:
        clip = render.render_clip(close_up(species, action), frames, 96)
        images = np.stack([picture.image for picture in clip]).astype(int)
        changed = (np.abs(np.diff(images, axis=0)).max(-1) > 40).mean()
        assert 0.02 < changed < 0.3, species
        assert (np.abs(images - images[0]).max(-1) > 40).mean((1, 2)).max() > 0.06


def test_the_hat_is_raised_with_the_hand():
    who = puppet("bear", headwear="top hat")
    for mirrored in (False, True):
        take = close_up("bear", "raising hat", mirrored=mirrored)
        clip = render.render_clip(dataclasses.replace(take, identity=who), 8)
        hats = [np.argwhere(picture.parts == config.PART_NAMES.index("headwear")).mean(0) for picture in clip]
        wrist = config.JOINTS.index("l_wrist" if mirrored else "r_wrist")
        hands = [picture.joints[wrist, 1] for picture in clip]
        assert hats[0][0] - hats[4][0] > 8 and hands[0] - hands[4] > 16
        assert np.corrcoef([hat[0] for hat in hats], hands)[0, 1] > 0.95
    bare = [render.render(close_up("bear", "raising hat", phase=phase)) for phase in (0.0, 0.5)]
    assert bare[0].joints[4, 1] - bare[1].joints[4, 1] > 16  # without a hat, the gesture


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
    for framing, unseen in (("full", set()), ("close_up", {"right_leg", "left_leg", "feet"})):
        seen = set()
        for seed in range(60):
            seen |= set(np.unique(render.render(world.sample_take(seed, framing=framing)).parts).tolist())
        assert {config.PART_NAMES[label] for label in seen} == set(config.PART_NAMES) - unseen


@pytest.mark.parametrize(("action", "framing"), ACTED)
def test_mirrored_joints_mirror(action, framing):
    plain, mirrored = (skeleton.pose(action, 0.37, "cat", 5, flip, framing) for flip in (False, True))
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


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far the joint moves that moves most, sides and mirror images taken as equal."""
    return min(np.linalg.norm(a - c, axis=-1).max() for c in (b, b[..., list(config.MIRROR), :] * (-1, 1)))


def test_mean_poses_are_far_apart():
    means = {action: np.mean([skeleton.pose(action, i / 16, "person", -1) for i in range(16)], 0)
             for action in config.ACTIONS}
    spread = {(a, b): distance(means[a], means[b]) for a, b in itertools.combinations(config.ACTIONS, 2)}
    closest = min(spread, key=spread.get)
    assert spread[closest] > 0.1, (closest, spread[closest])  # of the puppet's height; jitter moves 0.02


def test_close_ups_are_far_apart_as_clips():
    def cycle(action):
        joints = np.stack([skeleton.pose(action, i / 16, "person", -1, framing="close_up") for i in range(16)])
        return joints - joints[:, 1:2]

    cycles = {action: cycle(action) for action in CLOSE_UPS}
    for a, b in itertools.combinations(CLOSE_UPS, 2):
        apart = min(distance(cycles[a], np.roll(cycles[b], turn, 0)) for turn in range(16))
        assert apart > 0.05, (a, b)


@pytest.mark.parametrize(("action", "framing"), ACTED)
def test_cycles_close_and_are_smooth(action, framing):
    steps = 64
    cycle = np.stack([skeleton.pose(action, i / steps, "fox", 2, framing=framing) for i in range(steps + 1)])
    np.testing.assert_allclose(cycle[0], cycle[-1], atol=1e-9)
    speed = np.linalg.norm(np.diff(cycle, axis=0), axis=-1)
    assert speed.max() < 0.06
    assert np.ptp(cycle, axis=0).max() > 0.01


def test_limbs_keep_their_length():
    for action, framing, species in POSES:
        poses = [skeleton.pose(action, phase, species, 9, framing=framing) for phase in (0.0, 0.4, 0.8)]
        for a, b in ((2, 3), (3, 4), (5, 6), (8, 9), (12, 13), (1, 8)):
            lengths = [math.dist(joints[a], joints[b]) for joints in poses]
            assert max(lengths) - min(lengths) < (0.05 if b == 8 and action == "turning" else 1e-9), action


def test_clip_frames():
    take = world.sample_take(11)
    clip = render.render_clip(take, 8, 64)
    assert len(clip) == 8 and digest(clip[0]) == digest(render.render(take, 64))
    assert len({digest(frame) for frame in clip}) == 8
    assert {frame.caption for frame in clip} == {clip[0].caption}


@pytest.mark.parametrize("framing", config.FRAMINGS)
@pytest.mark.parametrize("detail", config.DETAILS[1:])
@pytest.mark.parametrize("species", config.SPECIES)
def test_every_detail_shows(species, detail, framing):
    if (detail, framing) == ("odd_trousers", "close_up"):
        return  # which world.sample_take leaves out
    action = {"full": "standing", "close_up": "nodding"}[framing]
    who = puppet(species, detail_colour=config.COLOURS["teal" if species == "penguin" else "yellow"])
    plain, detailed = (
        render.render(config.Take(dataclasses.replace(who, detail=d), action, framing=framing)).image.astype(int)
        for d in ("none", detail)
    )
    assert (np.abs(plain - detailed).max(-1) > 40).sum() >= {"full": 40, "close_up": 100}[framing]


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


def test_a_group_in_close_up():
    takes = [dataclasses.replace(world.sample_take(seed, framing="close_up"), action="nodding", scene="snow")
             for seed in (1, 2)]
    group, alone = render.render_group(takes), render.render(takes[0])
    assert 0.1 < group.mask.mean() < alone.mask.mean() and group.mask[:, :64].sum() > 0.8 * group.mask.sum()
    assert group.caption.startswith("close-up of a ") and group.caption.endswith(" nodding in the snow")
    assert group.joints[[0, 14, 15], 2].all()


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
