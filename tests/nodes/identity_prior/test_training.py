"""Training a prior by its node, on the theatre and on small models."""

import logging

import comfy.utils
import folder_paths
import pytest
import torch
from pack.nodes import subject_tokens
from pack.nodes.fingerprint import fingerprint
from pack.nodes.identity_prior import files, sampling, training
from pack.nodes.identity_prior.config import IdentityPriorConfig
from pack.nodes.identity_prior.mirrored_captions import mirrored
from pack.nodes.identity_prior.nodes import UnderstudyEncodeIdentity, UnderstudyLoadIdentityPrior
from pack.nodes.inputs.words import entries
from pack.nodes.puppets.config import NAMED_ACTIONS
from pack.nodes.subject_tokens import Subject
from pack.nodes.training import checkpoints, picture_training
from support import tiny_clip, tiny_model
from support.identity_edits import SHAPE, blended, inverted, sample, v_prediction
from support.identity_trainings import ROBOT, SIZE, saved, train


def test_a_prior_is_trained_previewed_saved_and_loaded(output, loaded, puppets, caplog):
    images, captions = puppets
    with caplog.at_level(logging.INFO):
        lora, identity, losses = train(loaded, images, captions, steps=3, preview_every=2)
    assert len(losses["loss"]) == 3 and "peak memory" in caplog.text
    assert identity.trigger == "sks robot" and all("sks robot" in text for text in identity.captions)
    assert identity.base == fingerprint(loaded[0])
    # Attention alone.
    stems = {key.split(".")[0] for key in lora}
    assert stems and all(stem.startswith("lora_unet_") and "attn" in stem for stem in stems)
    name = saved(lora, identity)
    caplog.clear()
    model, known, trigger = UnderstudyLoadIdentityPrior.execute(loaded[0], name, 1.0).result
    assert known == identity and trigger == "sks robot" and "another base" not in caplog.text
    assert len(model.patches) == len(stems)


class Shrinking:
    """A VAE of latents that are the picture's colours, an eighth the size."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        small = torch.nn.functional.avg_pool2d(pictures[..., :3].movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1) * 2 - 1


@pytest.mark.parametrize(("kind", "make"), [("SD 2.1", v_prediction), ("SDXL", tiny_model.xl)])
def test_models_of_v_prediction_and_of_two_encoders_learn_and_edit(puppets, kind, make):
    """With separate class pictures; then the prior edits: a picture is inverted with it and blended."""
    model = tiny_model.as_loaded(make())
    loaded = model, tiny_clip.as_loaded(tiny_clip.clip(kind)), Shrinking()
    images, captions = puppets
    lora, identity, losses = train(loaded, images, captions, steps=3, learning_rate=1e-2, class_count=1)
    assert torch.isfinite(torch.tensor(losses["loss"])).all()
    assert all(weight.any() for key, weight in lora.items() if "lora_up" in key), "zero until trained"
    with_prior = files.apply(model, lora, identity, 1.0, "prior")
    assert len(with_prior.patches) == len(lora) // 3 and identity.base == fingerprint(model)
    positive = UnderstudyEncodeIdentity.execute(loaded[1], identity, "a {subject} waving").result[0]
    with torch.inference_mode():
        latent = {"samples": loaded[2].encode(images[0])}
    inversion = inverted(with_prior, source=latent, positive=positive, steps=4)
    patched = blended(with_prior, inversion=inversion, positive=positive, threshold=0.9, grow=0)
    edited = sample(
        patched, inversion=inversion, positive=positive, negative=positive, latent=latent["samples"],
        shape=latent["samples"].shape,
    )
    joined = torch.maximum(*sampling.masks_of(patched, edited)).expand_as(edited)
    assert 0 < joined.mean() < 1 and torch.isfinite(edited).all()
    torch.testing.assert_close(edited[joined == 0], latent["samples"][joined == 0], rtol=1e-4, atol=1e-5)


def test_batches_cost_one_pass_of_twice_their_size(loaded, puppets):
    model = loaded[0]
    calls = []  # of steps, which have gradients

    def count(_module, inputs, _output):
        if torch.is_grad_enabled():
            calls.append(len(inputs[0]))

    handle = model.model.diffusion_model.register_forward_hook(count)
    images, captions = puppets
    options = {"class_images": images[:2], "batch_size": 2, "steps": 2}
    train(loaded, images, captions, **options)
    train(loaded, images, captions, **options, prior_weight=0.0)
    handle.remove()
    assert calls == [4, 4, 2, 2]


def test_a_resumed_training_equals_the_whole_one(output, loaded, puppets, monkeypatch):
    images, captions = puppets
    options = {"class_images": images[:1], "class_captions": ["a robot"]}
    whole = train(loaded, images, captions, steps=4, **options)[0]
    train(loaded, images, captions, steps=3, checkpoint_every=2, **options)
    (state,) = (output / checkpoints.FOLDER.name).glob("*.safetensors")
    folder_paths.filename_list_cache.clear()
    resumed = train(loaded, images, captions, steps=4, resume_from=state.name, **options)[0]
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)
    with pytest.raises(ValueError, match="class_captions"):  # before the class pictures are drawn, which takes long
        monkeypatch.setattr(training, "draw_class_pictures", None)
        train(loaded, images, captions, steps=4, resume_from=state.name)
    with pytest.raises(ValueError, match="made with prior_weight 1.0"):
        train(loaded, images, captions, steps=4, resume_from=state.name, prior_weight=0.5, **options)
    with pytest.raises(ValueError, match="made with different model"):
        other = tiny_model.as_loaded(tiny_model.picture(in_channels=8))
        train((other, *loaded[1:]), images, captions, steps=4, resume_from=state.name, **options)


def test_alpha_grey_one_reference_and_one_caption_for_all(loaded, puppets):
    rgba = torch.cat([puppets[0][0], torch.ones(1, SIZE, SIZE, 1)], -1)
    grey = puppets[0][0].mean(-1, keepdim=True)
    options = {"steps": 1, "class_count": 1}
    plain = train(loaded, [puppets[0][0]], ["a {subject} waving"], **options)[0]
    same = train(loaded, [rgba], ["a {subject} waving"], **options)[0]
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert train(loaded, [rgba, grey], ["a {subject} waving"], **options)[0].keys() == plain.keys()


@pytest.mark.parametrize(("captions", "words"), [
    (["a {subject}", "a {subject}"], "captions has 2 texts for 3 pictures"),
    (["a {subject}\na {subject}\na {subject}\na {subject}"], "captions has 4 texts for 3 pictures"),
    (["a {subject}", "a robot waving", "a {subject}"], "caption 2 of captions does not name the subject"),
])
def test_captions_that_do_not_fit_are_refused(loaded, puppets, captions, words):
    with pytest.raises(ValueError, match=words):
        train(loaded, puppets[0], captions)


def test_other_inputs_that_do_not_fit_are_refused(loaded, puppets):
    images, captions = puppets
    for settings, words in (
        ({"identity_token": "two words"}, "identity_token"), ({"class_noun": ""}, "class_noun"),
        ({"class_images": images[:2], "class_captions": ["a", "b", "c"]}, "class_captions has 3 texts"),
        ({"prior_weight": -1.0}, "prior_weight"),
    ):
        with pytest.raises(ValueError, match=words):
            train(loaded, images, captions, **settings)
    with pytest.raises(ValueError, match="images holds NaN"):
        train(loaded, [torch.full((1, 8, 8, 3), torch.nan)], ["a {subject}"])


def test_nothing_is_mirrored_unless_asked():
    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    left = picture.clone()
    left[:, :, :30] *= 0.1
    counts = {}
    for augment in ("none", "crop", "crop_and_flip"):
        pictures, texts = training.variants([left, left], ["a", "b"], augment, 3)
        assert len(pictures) == len(texts) and all(p.shape == left.shape for p in pictures)
        dark_left = [float(p[:, :, :30].mean()) < float(p[:, :, 30:].mean()) for p in pictures]
        counts[augment] = (len(pictures), sum(dark_left), texts.count("a"))
        again = training.variants([left, left], ["a", "b"], augment, 3)[0]
        assert all(torch.equal(a, b) for a, b in zip(pictures, again, strict=True))
        assert torch.equal(pictures[0], left)
    assert counts == {"none": (2, 2, 1), "crop": (8, 8, 4), "crop_and_flip": (16, 8, 8)}


def test_captions_of_mirror_images_say_the_other_side():
    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    caption = "Left of it, seen from the right, RIGHT, bright, leftover"
    _, texts = training.variants([picture], [caption], "crop_and_flip", 3)
    assert texts == [caption] * 4 + ["Right of it, seen from the left, LEFT, bright, leftover"] * 4


@pytest.mark.parametrize(("caption", "expected"), [
    ("a cat left of it, all right", "a cat right of it, all right"),
    ("right now he is on the right in the sun", "right now he is on the left in the sun"),
    ("right behind it, the right hand, a right angle", "right behind it, the left hand, a right angle"),
    ("nothing left, he left him, left-handed", "nothing left, he left him, right-handed"),
    ("looking right, the leftmost, rightwards", "looking left, the rightmost, leftwards"),
    ("Far Left and Far RIGHT", "Far Right and Far LEFT"),
    ("sks 猫在左边，右手举起", "sks 猫在右边，左手举起"),
    ("十岁左右的男孩站在右侧", "十岁左右的男孩站在左侧"),
    ("右を向いた sks 犬、左足", "左を向いた sks 犬、右足"),
    ("みぎ手、ヒダリ", "ひだり手、ミギ"),
    ("왼쪽의 sks 개, 오른손", "오른쪽의 sks 개, 왼손"),
    ("在left侧", "在right侧"),
])
def test_what_is_a_side_is_swapped_in_every_language_of_the_pack(caption, expected):
    """Words that only sound like a side stay: a mirror image is not "all left"."""
    assert mirrored(caption) == expected
    assert mirrored(expected) == caption


def test_class_captions_lose_the_subject_and_none_is_left_out(loaded, puppets, monkeypatch):
    encoded, drawn = [], []

    def generate(_model, conditionings, negative, shape, _seed):
        drawn.append((conditionings, negative))
        return [torch.randn(shape) for _ in conditionings]

    monkeypatch.setattr(training, "draw_class_pictures", generate)
    monkeypatch.setattr(picture_training, "encode_texts", lambda _clip, texts: encoded.append(texts) or texts)
    monkeypatch.setattr(picture_training, "train_on_pictures", lambda *_args, **_options: ({}, {"loss": []}))
    train(loaded, puppets[0][:1], ["a {subject}"], class_captions=["a {subject}\nA SKS robot waving\ntwo robots"])
    assert encoded[0] == ["a sks robot", "a robot", "A robot waving", "two robots", ""]
    assert drawn == [(encoded[0][1:-1], "")]
    train(loaded, puppets[0][:1], ["a {subject}"], class_images=puppets[0][:1], class_captions=["a {subject} here"])
    assert encoded[-1] == ["a sks robot", "a robot here", ""]


def test_class_pictures_show_listed_actions_and_not_the_learned_captions(loaded, puppets, monkeypatch):
    encoded = []
    monkeypatch.setattr(training, "draw_class_pictures", lambda _model, texts, *_: [torch.zeros(SHAPE)] * len(texts))
    monkeypatch.setattr(picture_training, "encode_texts", lambda _clip, texts: encoded.append(texts) or texts)
    monkeypatch.setattr(picture_training, "train_on_pictures", lambda *_args, **_options: ({}, {"loss": []}))
    learned = "a {subject} bowing on a stage"

    def class_texts(**settings):
        train(loaded, puppets[0][:1], [learned], **settings)
        assert encoded[-1][0] == "a sks robot bowing on a stage" and encoded[-1][-1] == ""
        return encoded[-1][1:-1]

    assert class_texts(class_count=3) == ["a robot standing", "a robot waving", "a robot jumping"]
    assert class_texts(class_actions="asleep、 seen from behind,", class_count=3) == [
        "a robot asleep", "a robot seen from behind", "a robot asleep"
    ]
    assert class_texts(class_actions=" ") == ["a robot bowing on a stage"] * 2
    assert class_texts(class_captions=["one robot"]) == ["one robot"] * 2


def test_every_default_action_is_one_that_the_theatre_names():
    assert set(entries(IdentityPriorConfig().class_actions)) <= set(NAMED_ACTIONS)


def test_another_models_clip_is_refused_before_the_model_draws(loaded, puppets, monkeypatch):
    monkeypatch.setattr(training, "draw_class_pictures", lambda *_: pytest.fail("it draws"))
    model, _, vae = loaded
    with pytest.raises(ValueError, match="^clip encodes texts in 40 channels and the model reads "):
        train((model, tiny_clip.clip("SDXL"), vae), puppets[0], ["a {subject}"])


def test_words_and_pictures_that_teach_little_are_told_of(loaded, puppets, monkeypatch, caplog):
    monkeypatch.setattr(picture_training, "train_on_pictures", lambda *_args, **_options: ({}, {"loss": []}))
    images = puppets[0]
    different = ["a {subject} waving", "{subject} in a forest", "{subject} sitting at night"]
    train(loaded, images, different, prior_weight=0.0)
    assert not caplog.records
    train(loaded, images[:1], ["a {subject}"], prior_weight=0.0, identity_token="zxv", class_noun="red dragon")
    assert "know the word 'zxv'" in caplog.text and "know the word 'dragon'" in caplog.text
    assert "'red'" not in caplog.text and "1 picture: the prior learns its pose" in caplog.text
    real = tiny_clip.clip()
    assert subject_tokens.warnings(real, ROBOT) == []
    (warning,) = subject_tokens.warnings(real, Subject("starfishing", "german shepherd"))
    assert "'starfishing' is 2 tokens" in warning


def test_class_pictures_come_from_the_model_and_the_seed(monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_rest: shown.append(values[:2]))
    model = tiny_model.as_loaded(tiny_model.picture())
    texts = [tiny_model.conditioning(1), tiny_model.conditioning(2)]
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        encoded, again, other = (
            training.draw_class_pictures(model, texts, tiny_model.conditioning(3), SHAPE, seed) for seed in (1, 1, 2)
        )
    assert [latent.shape for latent in encoded] == [SHAPE] * 2
    assert all(torch.equal(a, b) for a, b in zip(encoded, again, strict=True))
    assert not torch.equal(encoded[0], encoded[1]) and not torch.equal(encoded[0], other[0])
    assert shown[:2] == [(1, 2), (2, 2)] and "drawing class picture 2 of 2" in caplog.text
