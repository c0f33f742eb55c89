"""Training, saving, loading and naming a prior, on the theatre and on small models of the host."""

import json
import logging

import comfy.lora
import comfy.sd
import comfy.utils
import diffusers
import folder_paths
import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from pack.nodes import subject_tokens
from pack.nodes.files import weights
from pack.nodes.files.names import WeightFileError
from pack.nodes.fingerprint import fingerprint
from pack.nodes.identity_prior import files, sampling, training
from pack.nodes.identity_prior.nodes import (
    UnderstudyEncodeIdentity,
    UnderstudyLoadIdentityPrior,
)
from pack.nodes.identity_prior.training_nodes import UnderstudySaveIdentityPrior, UnderstudyTrainIdentityPrior
from pack.nodes.puppets import theatre, tokenizer
from pack.nodes.puppets.nodes import UnderstudyPuppetSet
from pack.nodes.subject_tokens import Subject
from pack.nodes.training import checkpoints, picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from support import tiny_clip, tiny_model
from support.identity_edits import SHAPE, blended, inverted, sample, v_prediction

ROBOT = Subject("sks", "robot", ("a sks robot waving",))
SIZE = 64


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The host's folders of LoRAs and of checkpoints of training, for one test."""
    for key in (files.FOLDER.name, checkpoints.FOLDER.name):
        listed = ([str(tmp_path / key)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, listed)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture(scope="module")
def loaded(pack_root):
    theatre.register()
    with torch.inference_mode():
        path = pack_root / "workflows" / "models" / "checkpoints" / "puppets_sd.safetensors"
        return comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)[:3]


@pytest.fixture(scope="module")
def puppets():
    images, _, _, captions, subjects = UnderstudyPuppetSet.execute(
        "red striped robot", "standing\nwaving", "beach", 3, 1, SIZE
    ).result
    texts = [text.replace(subject, "{subject}") for text, subject in zip(captions, subjects, strict=True)]
    return images, [text if "{subject}" in text else "a {subject} waving" for text in texts]


def train(loaded, images, captions, **settings):
    """The node, as the host calls it: every input a list."""
    model, clip, vae = loaded
    given = {
        "model": model, "clip": clip, "vae": vae, "identity_token": "sks", "class_noun": "robot", "steps": 2,
        "learning_rate": 1e-3, "rank": 2, "batch_size": 1, "seed": 5, "prior_weight": 1.0, "augment": "none",
        "resume_from": "none", "class_count": 2, "checkpoint_every": 0,
    }
    lists = {name: settings.pop(name) for name in ("class_images", "class_captions") if name in settings}
    given = {name: [value] for name, value in (given | settings).items()}
    with torch.inference_mode():
        return UnderstudyTrainIdentityPrior.execute(images=images, captions=captions, **given, **lists).result


def lora_of(model, seed=0, rank=2):
    """A LoRA as training leaves it, with noise for what was learnt."""
    with torch.inference_mode():
        lora, _ = picture_training.train_on_pictures(
            model, [torch.randn(SHAPE)], [tiny_model.conditioning(0)],
            TrainingConfig(steps=1, learning_rate=1e-2, seed=seed, checkpoint_every=0), LoraConfig(rank=rank),
            checkpoints=Checkpoints("test", {}), resume_from="none",
        )
    generator = torch.Generator().manual_seed(seed)
    return {key: weight if weight.ndim == 0 else torch.randn(weight.shape, generator=generator) * 0.2
            for key, weight in lora.items()}


def saved(lora, identity=ROBOT, prefix="anna"):
    UnderstudySaveIdentityPrior.execute(lora, identity, prefix)
    folder_paths.filename_list_cache.clear()
    return max(name for name in files.FOLDER.choices() if name.startswith(prefix))


# Training


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
    """With class pictures of their own; then the prior edits: it is inverted with and blended."""
    model = tiny_model.as_loaded(make())
    given = model, tiny_clip.as_loaded(tiny_clip.clip(kind)), Shrinking()
    images, captions = puppets
    lora, identity, losses = train(given, images, captions, steps=3, learning_rate=1e-2, class_count=1)
    assert torch.isfinite(torch.tensor(losses["loss"])).all()
    assert all(weight.any() for key, weight in lora.items() if "lora_up" in key), "zero until learnt"
    learnt = files.apply(model, lora, identity, 1.0, "prior")
    assert len(learnt.patches) == len(lora) // 3 and identity.base == fingerprint(model)
    positive = UnderstudyEncodeIdentity.execute(given[1], identity, "a {subject} waving").result[0]
    with torch.inference_mode():
        latent = {"samples": given[2].encode(images[0])}
    found = inverted(learnt, given=latent, positive=positive, steps=4)
    patched = blended(learnt, found=found, positive=positive, threshold=0.9, grow=0)
    edited = sample(
        patched, found=found, positive=positive, negative=positive, latent=latent["samples"],
        shape=latent["samples"].shape,
    )
    joined = torch.maximum(*sampling.masks_of(patched, edited)).expand_as(edited)
    assert 0 < joined.mean() < 1 and torch.isfinite(edited).all()
    torch.testing.assert_close(edited[joined == 0], latent["samples"][joined == 0], rtol=1e-4, atol=1e-5)


def test_batches_cost_one_pass_of_twice_their_size(loaded, puppets):
    model = loaded[0]
    calls = []
    handle = model.model.diffusion_model.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
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
    told = "Left of it, seen from the right, RIGHT, bright, leftover"
    _, texts = training.variants([picture], [told], "crop_and_flip", 3)
    assert texts == [told] * 4 + ["Right of it, seen from the left, LEFT, bright, leftover"] * 4


def test_class_captions_lose_the_subject_and_none_is_left_out(loaded, puppets, monkeypatch):
    made, drawn = [], []

    def generate(_model, conditionings, negative, shape, _seed):
        drawn.append((conditionings, negative))
        return [torch.randn(shape) for _ in conditionings]

    monkeypatch.setattr(training, "draw_class_pictures", generate)
    monkeypatch.setattr(picture_training, "encode_texts", lambda _clip, texts: made.append(texts) or texts)
    monkeypatch.setattr(picture_training, "train_on_pictures", lambda *_args, **_options: ({}, {"loss": []}))
    train(loaded, puppets[0][:1], ["a {subject}"], class_captions=["a {subject}\nA SKS robot waving\ntwo robots"])
    assert made[0] == ["a sks robot", "a robot", "A robot waving", "two robots", ""]
    assert drawn == [(made[0][1:-1], "")]
    train(loaded, puppets[0][:1], ["a {subject}"], class_images=puppets[0][:1], class_captions=["a {subject} here"])
    assert made[-1] == ["a sks robot", "a robot here", ""]


def test_words_and_pictures_that_teach_little_are_told_of(loaded, puppets, monkeypatch, caplog):
    monkeypatch.setattr(picture_training, "train_on_pictures", lambda *_args, **_options: ({}, {"loss": []}))
    images = puppets[0]
    train(loaded, images, ["a {subject}"], prior_weight=0.0)
    assert not caplog.records
    train(loaded, images[:1], ["a {subject}"], prior_weight=0.0, identity_token="zxv", class_noun="red dragon")
    assert "know the word 'zxv'" in caplog.text and "know the word 'dragon'" in caplog.text
    assert "'red'" not in caplog.text and "1 picture: the prior learns its pose" in caplog.text
    real = tiny_clip.clip()
    assert subject_tokens.warnings(real, ROBOT) == []
    (said,) = subject_tokens.warnings(real, Subject("starfishing", "german shepherd"))
    assert "'starfishing' is 2 tokens" in said


def test_class_pictures_come_from_the_model_and_the_seed(monkeypatch, caplog):
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *told, **_more: shown.append(told[:2]))
    model = tiny_model.as_loaded(tiny_model.picture())
    texts = [tiny_model.conditioning(1), tiny_model.conditioning(2)]
    with torch.inference_mode(), caplog.at_level(logging.INFO):
        made, again, other = (
            training.draw_class_pictures(model, texts, tiny_model.conditioning(3), SHAPE, seed) for seed in (1, 1, 2)
        )
    assert [latent.shape for latent in made] == [SHAPE] * 2
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], other[0])
    assert shown[:2] == [(1, 2), (2, 2)] and "drawing class picture 2 of 2" in caplog.text


# Files


def test_the_file_is_an_ordinary_lora_with_its_story(output):
    model = tiny_model.as_loaded(tiny_model.picture())
    lora = lora_of(model, rank=3)
    path = output / "loras" / saved(lora)
    weights = safetensors.torch.load_file(path)
    assert all(torch.equal(weights[key], lora[key]) for key in lora) and weights.keys() == lora.keys()
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    story = json.loads(metadata["understudy_identity"])
    assert story == {"token": "sks", "class_noun": "robot", "captions": ["a sks robot waving"], "base": ""}
    assert metadata["ss_network_dim"] == "3" and float(metadata["ss_network_alpha"]) == 3
    # kohya's own layout: three entries a layer, alpha without dimensions.
    for stem in {key.split(".")[0] for key in weights}:
        assert weights[f"{stem}.alpha"].ndim == 0 and weights[f"{stem}.lora_down.weight"].shape[0] == 3
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    assert len(comfy.lora.load_lora(weights, known)) == len(weights) // 3
    found, alphas = _convert_non_diffusers_lora_to_diffusers(dict(weights))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=tiny_model.CONTEXT, attention_head_dim=2,
    )
    unet.load_lora_adapter(found, prefix="unet", network_alphas=alphas)
    assert len([name for name, _ in unet.named_parameters() if "lora_" in name]) == 2 * len(weights) // 3


def test_loading_equals_the_native_loader_and_priors_mix(output):
    model = tiny_model.as_loaded(tiny_model.picture())
    first, second = lora_of(model, 1), lora_of(model, 2)
    names = [saved(first, prefix="anna"), saved(second, Subject("ohwx", "cat"), prefix="bob")]
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    both, identity, trigger = model, None, ""
    for name in names:
        both, identity, trigger = UnderstudyLoadIdentityPrior.execute(both, name, 0.7).result
    assert trigger == "ohwx cat" and identity.class_noun == "cat"
    native = model
    for lora in (first, second):
        native = comfy.sd.load_lora_for_models(native, None, lora, 0.7, 0)[0]
    sampler = comfy.samplers.sampler_object("euler")
    mixed = tiny_model.sample(both, sampler)
    assert torch.equal(mixed, tiny_model.sample(native, sampler))
    assert not torch.equal(mixed, tiny_model.sample(model, sampler))
    assert UnderstudyLoadIdentityPrior.execute(model, names[0], 0.0).result[0] is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.named_parameters())


def test_another_base_warns_and_another_shape_is_refused(output, caplog):
    model = tiny_model.as_loaded(tiny_model.picture())
    lora = lora_of(model)
    identity = Subject("sks", "robot", (), fingerprint(model))
    name = saved(lora, identity)
    with caplog.at_level(logging.WARNING):
        files.apply(model, lora, identity, 1.0, name)
        assert not caplog.records
        other = tiny_model.picture(seed=1)
        assert len(UnderstudyLoadIdentityPrior.execute(other, name, 1.0).result[0].patches) == len(lora) // 3
    assert "another base model" in caplog.text
    key = next(key for key in lora if key.endswith("attn2_to_k.lora_down.weight"))
    for changed, words in (
        ({**lora, key: torch.zeros(2, 99)}, r"attn2_to_k.lora_down.weight has shape \(2, 99\) and the model has a layer of shape \(32, 16\)"),
        ({"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)}, r"lora_unet_nowhere.lora_up.weight has shape \(2, 2\) and the model has no such layer"),
    ):
        with pytest.raises(WeightFileError, match=f"another kind of model: .*{words}"):
            files.apply(model, changed, identity, 1.0, name)
    assert not model.patches


def test_fingerprints_know_the_base_and_no_lora():
    model = tiny_model.picture()
    base = fingerprint(model)
    assert fingerprint(tiny_model.picture()) == base
    assert fingerprint(tiny_model.picture(seed=1)) != base
    assert fingerprint(tiny_model.picture(in_channels=9)) != base
    patched = comfy.sd.load_lora_for_models(model, None, lora_of(model), 1.0, 0)[0]
    assert fingerprint(patched) == base
    tiny_model.sample(patched, comfy.samplers.sampler_object("euler"), steps=1)
    comfy.model_management.load_models_gpu([patched])
    assert fingerprint(model) == base, "while the LoRA is applied"
    patched.unpatch_model()


def test_files_that_are_no_prior_are_refused(output):
    lora = lora_of(tiny_model.picture())
    weights.save(lora, {}, "loras", "plain")
    weights.save(lora, {"understudy_identity": "{}"}, "loras", "broken")
    folder_paths.filename_list_cache.clear()
    for name, words in (("plain_00001_.safetensors", "Load LoRA"), ("broken_00001_.safetensors", "badly")):
        with pytest.raises(WeightFileError, match=words):
            files.load(name)


# Prompts


def test_a_prompt_remembers_the_subject_s_tokens(loaded):
    clip = loaded[1]
    text = "a red {subject} waving on a beach"
    conditioning = UnderstudyEncodeIdentity.execute(clip, ROBOT, text).result[0]
    plain = clip.encode_from_tokens_scheduled(clip.tokenize("a red sks robot waving on a beach"))
    assert torch.equal(conditioning[0][0], plain[0][0])
    columns = subject_tokens.tagged_positions(conditioning)
    ids = [token for token, _ in clip.tokenize("a red sks robot waving on a beach")["l"][0]]
    assert [tokenizer.WORDS[ids[i]] for i in columns] == ["sks", "robot"]
    with pytest.raises(ValueError, match="does not name the subject"):
        UnderstudyEncodeIdentity.execute(clip, ROBOT, "a robot waving")
