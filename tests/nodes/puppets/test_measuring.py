"""The measuring tools: metrics on true renders, what they react to, and the shipped eye's least accuracy."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from experiments import theatre_wan
from experiments.measuring import data, eye, metrics
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes.puppets import render, world
from pack.nodes.puppets.config import COLOURS, NAMED_ACTIONS, PART_NAMES, Take
from PIL import Image, ImageFilter

HELD_OUT = 64


@pytest.fixture(scope="module")
def shown():
    """Takes with named actions of the test identities, and their pictures."""
    takes = [data.test_take(i) for i in range(HELD_OUT)]
    return takes, [render.render(take) for take in takes]


def other_colour(colour):
    """The named colour farthest from `colour`."""
    return max(COLOURS.values(), key=lambda c: sum((a - b) ** 2 for a, b in zip(c, colour)))


# ------------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((1.0, 0.0, 0.0), (53.24, 80.09, 67.20)),  # published conversions of the sRGB primaries
        ((0.0, 1.0, 0.0), (87.73, -86.18, 83.18)),
        ((0.0, 0.0, 1.0), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_the_primaries(rgb, expected):
    np.testing.assert_allclose(metrics.lab(np.array(rgb)), expected, atol=0.05)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_lab_lightness_follows_luminance(rgb):
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in rgb)
    luminance = 0.2126729 * red + 0.7151522 * green + 0.0721750 * blue
    root = luminance ** (1 / 3) if luminance > 216 / 24389 else (24389 / 27 * luminance + 16) / 116
    assert metrics.lab(np.array(rgb))[0] == pytest.approx(116 * root - 16, abs=1e-3)


# ------------------------------------------------------------------------------------------------ identity


def test_a_true_render_has_no_identity_error(shown):
    for take, picture in zip(*(x[:8] for x in shown)):
        assert metrics.identity_error(picture.image, take.identity, picture.parts, take)["mean"] == 0


def test_the_identity_error_does_not_need_the_take(shown):
    for take in shown[0][:8]:
        drawn = render.render(dataclasses.replace(take, scene="stage", light="day"))
        assert metrics.identity_error(drawn.image, take.identity, drawn.parts)["mean"] < 12


@pytest.mark.parametrize(
    ("garment", "parts"),
    [
        ("shirt", ("torso", "right_arm", "left_arm")),
        ("trousers", ("right_leg", "left_leg")),
        ("headwear_colour", ("headwear",)),
        ("skin", ("head",)),
    ],
)
def test_a_swapped_colour_shows_in_its_parts_alone(garment, parts):
    who = dataclasses.replace(
        world.test_identities()[0], headwear="cap", pattern="plain", detail="none", species="cat"
    )
    take = Take(who, "cheering")
    swapped = dataclasses.replace(who, **{garment: other_colour(getattr(who, garment))})
    picture = render.render(dataclasses.replace(take, identity=swapped))
    errors = metrics.identity_error(picture.image, who, picture.parts, take)
    assert all(errors[part] > 25 for part in parts)
    untouched = [name for name in metrics.COLOURED if name in errors and name not in parts]
    # Ears and head of an animal are the same fur.
    assert all(errors[name] < 6 for name in untouched if not (garment == "skin" and name == "ears"))


def test_a_changed_pattern_shows_in_the_torso():
    who = dataclasses.replace(
        world.test_identities()[0], shirt=COLOURS["blue"], pattern="plain", detail="none"
    )
    striped = dataclasses.replace(who, pattern="striped", pattern_colour=COLOURS["white"])
    take = Take(who, "standing")
    picture = render.render(dataclasses.replace(take, identity=striped))
    assert metrics.identity_error(picture.image, who, picture.parts, take)["torso"] > 10


def test_compositions_accept_the_truth_and_refuse_a_swap(shown):
    takes, pictures = (x[:32] for x in shown)
    images = np.stack([p.image for p in pictures])
    assert np.mean([row["composition"] for row in metrics.compositions(images, takes)]) >= 0.8
    recoloured = [
        dataclasses.replace(
            t,
            identity=dataclasses.replace(
                t.identity, shirt=other_colour(t.identity.shirt), trousers=other_colour(t.identity.trousers)
            ),
        )
        for t in takes
    ]
    assert not any(row["identity"] for row in metrics.compositions(images, recoloured))
    moved = [
        dataclasses.replace(t, action="handstand" if t.action != "handstand" else "sitting") for t in takes
    ]
    assert np.mean([row["action"] for row in metrics.compositions(images, moved)]) <= 0.05


# ------------------------------------------------------------------------------------------------ the rest


def test_joint_distances_by_hand():
    truth = np.zeros((1, 18, 3))
    truth[..., 2] = 1
    found = np.zeros((1, 18, 2))
    found[0, 3], found[0, 4] = (3, 4), (0, 5)
    truth[0, 4, 2] = 0
    distance = metrics.joint_distances(found, truth)
    assert distance[0, 3] == 5 and np.isnan(distance[0, 4]) and np.nansum(distance) == 5


def test_joint_error_grows_with_another_pose(shown):
    takes, pictures = shown
    for take, picture in list(zip(takes, pictures))[:6]:
        other = dataclasses.replace(take, action="handstand" if take.action != "handstand" else "sitting")
        assert metrics.joint_error(picture.image, picture.joints) < 8
        assert metrics.joint_error(render.render(other).image, picture.joints) > 12


def test_background_error_counts_the_outside_alone():
    truth = np.full((8, 8, 3), 100, np.uint8)
    image, subject = truth.copy(), np.zeros((8, 8), bool)
    subject[2:6, 2:6] = True
    image[subject] = 255
    assert metrics.background_error(image, truth, subject) == 0
    image[0] = 151
    assert metrics.background_error(image, truth, subject) == pytest.approx(0.2 * math.sqrt(8 / 48))
    with pytest.raises(ValueError, match="whole picture"):
        metrics.background_error(image, truth, np.ones((8, 8), bool))


def test_phase_scores_of_equal_and_turned_pictures(shown):
    image = shown[1][0].image
    assert metrics.phase_score(image, image) == pytest.approx(1)
    # The published score cannot see a half turn; the circular one can.
    assert metrics.phase_score(image, np.roll(image[::-1, ::-1], 1, (0, 1))) == pytest.approx(1, abs=1e-6)
    assert metrics.circular_phase_score(image, image) == pytest.approx(1)
    assert metrics.circular_phase_score(np.roll(image[::-1, ::-1], 1, (0, 1)), image) < 0.8


def test_wilson_interval_by_hand():
    # Newcombe 1998, table I: 81 of 263.
    mean, low, high = metrics.mean_interval(np.arange(263) < 81)
    assert mean == pytest.approx(81 / 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_bootstrap_interval_covers_like_the_normal_one():
    values = np.random.default_rng(3).normal(2, 1, 400)
    mean, low, high = metrics.mean_interval(values)
    half = 1.96 * values.std() / 20
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    with pytest.raises(ValueError, match="at least one case"):
        metrics.mean_interval([])


def test_nearest_training_picture_is_found(shown):
    images = np.stack([p.image for p in shown[1][:16]])
    training = metrics.thumbnails(images)
    distances, nearest = metrics.nearest_training_distance(images[[5, 9]], training)
    assert nearest.tolist() == [5, 9] and np.all(distances == 0)
    brighter = np.clip(images[5].astype(int) + 10, 0, 255).astype(np.uint8)
    distances, nearest = metrics.nearest_training_distance(brighter[None], training)
    assert nearest[0] == 5 and 0.02 < distances[0] <= 10 / 255 + 1e-6


# ------------------------------------------------------------------------------------------------ the eye


def test_the_eye_reads_held_out_renders(shown):
    takes, pictures = shown
    seen = eye.look(metrics.trained_eye(), np.stack([p.image for p in pictures]))
    assert all(take.action in NAMED_ACTIONS for take in takes)
    assert np.mean([a == t.action for a, t in zip(seen.actions, takes)]) >= 0.9
    assert np.mean([s == t.identity.species for s, t in zip(seen.species, takes)]) >= 0.9
    assert np.mean([h == t.identity.headwear for h, t in zip(seen.headwear, takes)]) >= 0.85
    assert np.mean([p == t.identity.pattern for p, t in zip(seen.patterns, takes)]) >= 0.9
    distance = metrics.joint_distances(seen.joints, np.stack([p.joints for p in pictures]))
    assert np.nanmean(distance) < 4
    parts = np.stack([p.parts for p in pictures])
    for name, least in (("background", 0.9), ("head", 0.5), ("torso", 0.65), ("right_leg", 0.6)):
        ours, right = seen.parts == PART_NAMES.index(name), parts == PART_NAMES.index(name)
        assert (ours & right).sum() >= least * (ours | right).sum(), name


def test_the_eye_rejects_what_shows_no_puppet(shown):
    pictures = data.to_tensor(np.stack([p.image for p in shown[1]]))
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (16, 128, 128, 3)).astype(np.uint8)
    assert set(eye.look(metrics.trained_eye(), noise).actions) == {eye.REJECT}
    for kind in ("noise", "empty", "shuffle", "blur"):
        bad = data.rejects(pictures, rng, kind).permute(0, 2, 3, 1).numpy()
        assert np.mean([a == eye.REJECT for a in eye.look(metrics.trained_eye(), bad).actions]) >= 0.8, kind


def test_the_eye_refuses_pictures_of_another_shape():
    with pytest.raises(ValueError, match=r"\[N, H, H, 3\]"):
        eye.look(metrics.trained_eye(), np.zeros((1, 128, 96, 3), np.uint8))


def test_soft_argmax_finds_a_peak_and_the_middle():
    heat = torch.zeros(1, 2, 32, 32)
    heat[0, 0, 7, 20] = 50
    joints = eye.soft_argmax(heat)[0]
    assert joints[0].tolist() == pytest.approx([20.5 / 32, 7.5 / 32], abs=1e-4)
    assert joints[1].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_damage_and_rejects_are_seeded(shown):
    pictures = data.to_tensor(np.stack([p.image for p in shown[1][:4]]))
    for make in (
        data.damaged,
        *(lambda x, rng, kind=kind: data.rejects(x, rng, kind) for kind in data.REJECT_KINDS),
    ):
        first, second, third = (make(pictures.clone(), np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, second) and first.shape == pictures.shape
        assert float(first.min()) >= 0 and float(first.max()) <= 1
        assert make is data.damaged or not torch.equal(first, pictures)
        assert third.shape == pictures.shape


def test_structural_similarity_is_that_of_its_formula_window_by_window():
    """Against loops over the places of a small picture (Wang et al. 2004)."""
    rng = np.random.default_rng(0)
    a, b = rng.random((13, 14, 3)), rng.random((13, 14, 3))
    window = np.exp(-np.add.outer(np.arange(-5, 6) ** 2, np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top in range(3):
        for left in range(4):
            for channel in range(3):
                x, y = (p[top : top + 11, left : left + 11, channel] for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                vxy = (window * (x - mx) * (y - my)).sum()
                found.append(
                    (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
                )
    assert metrics.ssim(a, b) == pytest.approx(np.mean(found), abs=1e-9)
    assert metrics.ssim(a, a) == pytest.approx(1)


def test_the_feature_distance_tells_a_blur_from_another_puppet():
    take = world.sample_take(3, "validation")
    image = render.render(take).image
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6)))
    other = render.render(dataclasses.replace(take, identity=world.sample_identity(5))).image
    assert metrics.feature_distance(image, image) == 0
    assert 0 < metrics.feature_distance(blurred, image) < metrics.feature_distance(other, image) < 2


def test_movement_and_flicker_are_relative_to_the_true_clip():
    take = dataclasses.replace(world.sample_take(3, "validation", "close_up"), action="waving")
    truth = theatre_wan.drawn([take], 64, 9)
    half = truth[:, ::4].repeat(4, 1)[:, :9]  # stands, then jumps
    still = np.repeat(truth[:, :1], 9, 1)
    rows = [theatre_wan.rows_of("arm", [take], clip, truth)[0] for clip in (truth, still, half)]
    moved = np.abs(np.diff(truth[0].astype(float), axis=0)).mean()
    assert theatre_wan.movement(truth[0]) == pytest.approx(moved) and moved > 1
    assert [rows[0][name] for name in ("movement", "flicker")] == pytest.approx([1, 1])
    assert [rows[1][name] for name in ("movement", "flicker")] == [0, 0]
    second = np.abs(np.diff(half[0].astype(float), n=2, axis=0)).mean()
    expected = second / np.abs(np.diff(truth[0].astype(float), n=2, axis=0)).mean()
    assert rows[2]["flicker"] == pytest.approx(expected) and expected != 1
