"""What the doctor finds in pictures, masks and captions, and what it lets pass."""

import io

import numpy as np
import pytest
import torch
from pack.nodes.fusion_embedding import training_nodes
from pack.nodes.puppets.nodes import UnderstudyPuppet
from pack.nodes.training import doctor
from PIL import Image
from support import tiny_model

WHO = "red striped robot with blue trousers and a yellow cap"


def puppet(action="waving", scene="beach", seed=0):
    return UnderstudyPuppet.execute(WHO, action, scene, 1, seed).result[0]


@pytest.fixture(scope="module")
def pictures():
    """Four of one puppet, in different places and actions."""
    return [puppet(*take) for take in (("waving", "beach"), ("jumping", "forest"), ("sitting", "night"))] + [
        puppet("waving", "beach", 3)
    ]


def jpeg(picture, quality=40):
    buffer = io.BytesIO()
    Image.fromarray((picture[0].numpy() * 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).float()[None] / 255


def texts(findings):
    return doctor.lines(findings)


CAPTIONS = ["a {subject} waving on a beach", "a {subject} jumping in a forest", "a {subject} sitting at night"]


def test_a_varied_set_has_no_finding(pictures):
    assert texts(doctor.examine(pictures[:3], CAPTIONS)) == []


def like_a_photograph(side=128):
    """Noise whose detail falls with its size as that of natural pictures does (Field, 1987), [1, H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)).clamp(min=1 / side)
    spectra = torch.fft.fft2(torch.randn(3, side, side, generator=generator)) / frequencies
    noise = torch.fft.ifft2(spectra).real
    return (0.5 + 0.15 * noise / noise.std()).clamp(0, 1).movedim(0, -1)[None]


def test_a_photograph_for_the_puppets_models_is_noticed(loaded, pictures):
    model, _, vae = loaded
    mixed = [*pictures, like_a_photograph(), jpeg(pictures[0], 90), enlarged(pictures[1])]
    (finding,) = doctor.of_strangers(mixed, "images", model, vae)
    assert "images: 5 of 7 is no puppet" in finding.text and "for people open" in finding.text and finding.serious
    assert finding.text in texts(doctor.examine(mixed, ["a puppet"] * 7, model=model, vae=vae))
    assert not list(doctor.of_strangers(pictures, "images", model, vae))
    assert not list(doctor.of_strangers(mixed, "images", tiny_model.picture(), vae))
    assert not list(doctor.of_strangers(mixed, "images", model, None))


def test_a_photograph_among_the_targets_of_a_fusion_is_noticed_by_its_number(loaded, pictures, caplog):
    model, _, vae = loaded
    (_, _, pose, _) = UnderstudyPuppet.execute(WHO, "waving", "beach", 1, 0).result
    targets = [*pictures, *pictures, *pictures, like_a_photograph(), *pictures[1:]]  # every other one is looked at
    lists = {"source": pictures[:1], "target": targets, "pose": [pose] * 16, "model": [model], "vae": [vae]}
    training_nodes._values_and_pairs(lists, "Train Fusion Generator", {})
    assert "target: 13 is no puppet, and these small models know puppets only" in caplog.text


def test_all_pairs_of_a_fusion_are_compared_and_their_masks_looked_at(pictures, caplog, monkeypatch):
    """Two copies and an empty mask, none of them among the pairs whose light is looked at."""
    monkeypatch.setattr(training_nodes, "_LOOKED_AT", 1)
    (_, _, pose, _) = UnderstudyPuppet.execute(WHO, "waving", "beach", 1, 0).result
    targets = [*pictures[:3], pictures[1]]
    drawn = [mask(5, 15)[None], mask(5, 15)[None], torch.zeros(1, 20, 20), mask(5, 15)[None]]
    lists = {"source": pictures[:1], "target": targets, "pose": [pose] * 4}
    _, data, masks = training_nodes._values_and_pairs({**lists, "masks": drawn}, "Train Fusion Combiner", {})
    assert (len(data), len(masks)) == (4, 4)
    assert "target: pictures 2 and 4 are nearly the same" in caplog.text
    assert "masks: 3 of 4 is empty" in caplog.text
    caplog.clear()
    monkeypatch.setattr(training_nodes, "_COMPARED", 3)
    with caplog.at_level("INFO"):
        training_nodes._values_and_pairs(dict(lists), "Train Fusion Combiner", {})
    assert "3 of 4 targets, spread evenly, are compared for near-duplicates" in caplog.text
    assert "nearly the same" not in caplog.text, "the fourth, a copy of the second, is left out"


def enlarged(picture):
    return torch.nn.functional.interpolate(picture.movedim(-1, 1), (200, 200), mode="bicubic").movedim(1, -1)


COPIES = {
    "re-encoded": jpeg, "enlarged": enlarged, "mirrored": lambda picture: picture.flip(2),
    "cropped": lambda picture: picture[:, 2:-2, 2:-2], "darker": lambda picture: picture * 0.7,
}


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_found_by_its_number_and_another_action_in_the_same_place_is_none(pictures, change):
    copied = [*pictures, COPIES[change](pictures[1])]
    assert doctor.copies([doctor.features(picture) for picture in copied]) == [(1, 4)]
    (finding,) = doctor.of_copies([doctor.features(picture) for picture in copied], "images")
    assert "images: pictures 2 and 5 are nearly the same" in finding.text and not finding.serious
    (finding,) = doctor.of_copies([doctor.features(pictures[0])] * 3, "target", [4, 7, 9])
    assert "5 and 8" in finding.text and finding.serious, "most of the set"


def test_videos_are_compared_as_latents():
    videos = [torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    other_length = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    of = [doctor.features(video) for video in (*videos, videos[2] * 1.1, other_length)]
    assert doctor.copies(of) == [(2, 3)]


def test_one_light_is_found_and_others_pass(pictures):
    dull = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    same_light = [picture[None] for picture in dull]
    assert any("same brightness" in line for line in texts(doctor.of_light(same_light, "images")))
    one_in_the_sun = [*same_light, same_light[0] * 1.5]
    assert not any("same brightness" in line for line in texts(doctor.of_light(one_in_the_sun, "images")))
    assert texts(doctor.of_light(same_light[:2], "images")) == [], "two pictures say nothing"


@pytest.mark.parametrize(("side", "flip"), [("right", False), ("left", True)])
def test_light_from_one_side_is_found(side, flip):
    ramp = torch.linspace(0.2, 0.8, 32).expand(32, 32)[None, ..., None].expand(-1, -1, -1, 3)
    lit = [(ramp.flip(2) if flip else ramp) * level for level in (0.5, 0.8, 1.0)]
    (line,) = [line for line in texts(doctor.of_light(lit, "images")) if "half" in line]
    assert f"the {side} half is the brighter" in line
    assert not any("half" in line for line in texts(doctor.of_light([*lit, lit[0].flip(2)], "images")))


def test_sizes_are_those_of_the_model():
    def of(width, height, native=512):
        return texts(doctor.of_sizes([(width, height)], "images", native))

    assert of(512, 512) == [] and of(640, 448) == [] and of(100, 100, None) == []
    assert "200 x 200 pixels is small for a model of 512" in of(200, 200)[0]
    assert "1024 x 1024 pixels is large" in of(1024, 1024)[0]
    assert "very long" in of(1200, 300)[0]
    serious = [finding.serious for finding in doctor.of_sizes([(300, 300)], "images", 512)]
    assert serious == [False], "not half of it yet"
    many = doctor.sizes([torch.zeros(1, 64, 64 + 8 * i, 3) for i in range(5)])
    assert many[1] == (72, 64)
    assert any("5 sizes" in line for line in texts(doctor.of_sizes(many, "images", None)))


def mask(left, right, size=20):
    drawn = torch.zeros(size, size)
    drawn[4:16, left:right] = 1
    return drawn


def test_masks_without_a_subject_or_background_are_found():
    lines = texts(doctor.of_masks([mask(5, 15), torch.zeros(20, 20), torch.ones(20, 20)]))
    assert any("masks: 2 of 3 is empty" in line for line in lines)
    assert any("masks: 3 of 3 is nearly all 1" in line for line in lines)
    assert texts(doctor.of_masks([mask(5, 15), mask(0, 8), mask(12, 20)])) == []
    assert "on the left of every picture" in texts(doctor.of_masks([mask(0, 7), mask(1, 8), mask(0, 5)]))[0]
    read_once = iter([mask(5, 15), torch.zeros(20, 20)])
    assert "masks: 8 of 2 is empty" in texts(doctor.of_masks(read_once, [3, 7], "video"))[0]


@pytest.mark.parametrize(("captions", "words", "serious"), [
    (["a robot"] * 3, "all 3 say the same, 'a robot'", True),
    (["A robot", "a  ROBOT"], "all 2 say the same", False),
    (["a robot waving", "", "a robot sitting"], "2 of 3 is empty", True),
    (["a red sks on a beach", "a red sks, jumping", "at night, a red sks sits"], "every caption says 'red'", False),
    (["from the left, waving", "sitting, left view", "left side of it in snow"], "every caption says 'left'", False),
    (["側面の写真、海", "側面の写真、森", "側面の写真、夜"], "'側面'", False),
])
def test_captions_that_teach_badly_are_found(captions, words, serious):
    findings = [f for f in doctor.of_captions(captions, "captions", ("sks", "robot")) if words in f.text]
    assert [finding.serious for finding in findings] == [serious]


def test_words_that_stand_for_the_subject_are_no_finding():
    captions = ["sks robot waving on a beach", "sks robot in a forest", "a photo of sks robot"]
    assert texts(doctor.of_captions(captions, "captions", ("sks", "robot"))) == []
    assert "'sks', 'robot'" in texts(doctor.of_captions(captions, "captions"))[0]


def test_what_should_be_learned_is_found_as_a_word():
    captions = ["a cat dancing", "a dog", "Dancing robots", "a dancer"]
    (finding,) = doctor.of_named(captions, "subjects", ("dancing, skipping",))
    assert "subjects: 1, 3 of 4 say 'dancing'" in finding.text and finding.serious
    assert texts(doctor.of_named(captions, "subjects", ("", "skipping"))) == []


def test_masks_as_train_nodes_have_them_count(pictures):
    """[1, H, W, 1], or none at all."""
    masks = [torch.rand(1, 16, 16, 1), torch.zeros(1, 16, 16, 1), torch.rand(1, 16, 16, 1)]
    (line,) = texts(doctor.examine(pictures[:3], CAPTIONS, masks=masks))
    assert "masks: 2 of 3 is empty" in line
    assert texts(doctor.examine(pictures[:3], CAPTIONS, masks=None)) == []


def test_serious_findings_come_first(pictures):
    findings = doctor.examine([pictures[0]] * 3, ["a robot"] * 3, masks=[torch.ones(8, 8)] * 3)
    flags = [finding.serious for finding in findings]
    assert flags == sorted(flags, reverse=True) and set(flags) == {True, False}


@pytest.mark.parametrize(("before", "after", "words", "serious"), [
    (0.2, 0.15, "0.1500, and 0.2000 before training (-25%)", False),
    (0.2, 0.2, "learned nothing", True), (0.2, float("nan"), "learned nothing", True),
    (0.2, 0.3, "(+50%)", True), (0.2, 0.05, "fewer steps", False),
])
def test_the_losses_are_read(before, after, words, serious):
    finding = doctor.compared(before, after)
    assert words in finding.text and finding.serious is serious
