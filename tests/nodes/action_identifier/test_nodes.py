"""The action identifier's nodes: schema as agreed, inputs as graphs give them, and one graph with other methods."""

import logging
import types

import comfy.samplers
import pytest
import torch
from comfy_api.latest import io
from pack.nodes.action_identifier import sampling, training
from pack.nodes.action_identifier.nodes import (
    UnderstudyApplyActionIdentifier,
    UnderstudyEncodeAction,
    UnderstudyLoadActionIdentifier,
)
from pack.nodes.action_identifier.training_nodes import (
    UnderstudySaveActionIdentifier,
    UnderstudyTrainActionIdentifier,
)
from pack.nodes.consent.record import ConsentRecord
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler, UnderstudyStepwisePrompt
from pack.nodes.subject_tokens import Subject
from support import action_identifiers, tiny_clip, tiny_model

MODEL = action_identifiers.reading(tiny_model.picture())
CLIP = tiny_clip.clip()
EULER = comfy.samplers.sampler_object("euler")


class Pictures:
    """Encodes a picture [1, 64, 64, 3] as its mean colours, [1, 4, 8, 8]."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, picture):
        grid = picture.reshape(1, 8, 8, 8, 8, 3).mean((2, 4)).movedim(-1, 1)
        return torch.cat([grid, grid.mean(1, keepdim=True)], dim=1)


def images(count=3, size=64):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(count))


def train(**lists):
    values = {
        "model": [MODEL], "clip": [CLIP], "vae": [Pictures()], "images": [images()],
        "subjects": ["a cat\na dog\na fox"], "placeholder": ["<action>"], "initial_word": ["dancing"], "steps": [2],
        "context_steps": [1],
        "learning_rate": [1e-2], "mask_percentile": [0.6], "merge": ["union"], "seed": [0], "resume_from": ["none"],
        "checkpoint_every": [0], "contrast_images": [images(3)], **lists,
    }
    with torch.inference_mode():
        return UnderstudyTrainActionIdentifier.execute(**values).result


@pytest.mark.parametrize(("node", "required", "outputs"), [
    (UnderstudyTrainActionIdentifier,
     ["model", "clip", "vae", "images", "subjects", "placeholder", "initial_word", "steps", "context_steps",
      "learning_rate", "mask_percentile", "merge", "seed", "contrast_images", "resume_from"],
     ["UNDERSTUDY_ACTION", "LOSS_MAP"]),
    (UnderstudySaveActionIdentifier, ["action", "filename_prefix"], []),
    (UnderstudyLoadActionIdentifier, ["action_name"], ["UNDERSTUDY_ACTION"]),
    (UnderstudyEncodeAction, ["clip", "text", "actions", "identity"], ["CONDITIONING"]),
    (UnderstudyApplyActionIdentifier, ["model", "strength"], ["MODEL"]),
])
def test_inputs_and_outputs_are_those_agreed_on(node, required, outputs):
    schema = node.GET_SCHEMA()
    ids = [widget.id for widget in schema.inputs]
    assert ids[: len(required)] == required
    further = schema.inputs[len(required) :]
    plain = "consent", "purpose", "masks", "preview"
    assert all(widget.optional and (widget.advanced or widget.id in plain) for widget in further)
    assert [output.io_type for output in schema.outputs] == outputs


def test_it_trains_on_lists_batches_and_lines_alike():
    batch, _ = train()
    listed, _ = train(images=list(images().split(1)), subjects=["a cat", "a dog", "a fox"])
    assert torch.equal(batch.tokens["l"], listed.tokens["l"])
    grey, loss_map = train(images=[images()[..., :1]], contrast_images=[torch.cat([images(), images()[..., :1]], -1)])
    assert torch.isfinite(grey.tokens["l"]).all() and len(loss_map["loss"]) == 2


def test_consent_goes_with_the_action():
    consent = ConsentRecord("Anna", ("training",))
    assert train(consent=[consent])[0].consent == consent and train()[0].consent is None


def test_the_noise_levels_weight_reaches_the_training():
    plain, weighed = (train(min_snr_gamma=[gamma])[0].tokens["l"] for gamma in (0.0, 0.1))
    assert torch.equal(plain, train()[0].tokens["l"]) and not torch.equal(plain, weighed)


def test_what_is_learned_behind_the_encoder_is_asked_for_by_the_node(monkeypatch):
    runs, original = [], training.train

    def watched(model, clip, exemplars, action, config, *, checkpoints, **others):
        runs.append((action, config, checkpoints.settings))
        return original(model, clip, exemplars, action, config, checkpoints=checkpoints, **others)

    monkeypatch.setattr(training, "train", watched)
    plain = train()[0]
    behind = train(
        behind_encoder=[True], lowest_noise=[0.45], highest_noise=[0.9], merge=["every channel"], steps=[3]
    )[0]
    assert plain.offsets is None and behind.offsets.any()
    (_, before, old), (action, after, new) = runs
    assert (before.batch_size, before.decay) == (1, 0) and (after.batch_size, after.decay) == (3, 1)
    assert (action.lowest_noise, action.highest_noise) == (0.45, 0.9)
    later = {"behind_encoder", "lowest_noise", "highest_noise", "steps"}
    assert not later & set(old), "checkpoints from before go on"
    assert later <= set(new)


@pytest.mark.parametrize(("values", "message"), [
    ({"images": [images(1)], "subjects": ["a cat"]}, "images holds 1 picture: give at least 2"),
    ({"subjects": ["a cat\na dog"]}, "subjects has 2 texts for 3 pictures"),
    ({"contrast_images": [images(2)]}, "contrast_images holds 2 pictures for 3 images"),
    ({"images": [images(2), images(1, 128)]}, "the pictures have the sizes 64 x 64, 128 x 128: scale"),
    ({"contrast_images": [images(3, 128)]}, "the pictures have the sizes"),
    ({"images": [images() * float("nan")]}, "images holds NaN"),
    ({"placeholder": ["two words"]}, "placeholder is 'two words': use one word"),
    ({"placeholder": ["(x)"]}, "placeholder is"),
    ({"initial_word": [" "]}, "initial_word is empty"),
    ({"contrast_words": [" , "]}, "contrast_words is empty"),
    ({"merge": ["both"]}, "merge is 'both'"),
    ({"mask_percentile": [1.0]}, "mask_percentile is 1.0"),
    ({"learning_rate": [0.0]}, "learning_rate is 0"),
])
def test_inputs_that_do_not_fit_are_named_with_what_to_do(values, message):
    with pytest.raises(ValueError, match=message):
        train(**values)


@pytest.mark.parametrize(("values", "warning"), [
    ({}, None),
    ({"initial_word": ["doing starfishing"]}, "initial_word: the text encoder does not know starfishing as a whole"),
    ({"subjects": ["a cat", "", "a fox"]}, "subjects are empty, so"),
    ({"subjects": [""]}, "subjects are empty, so who is in the pictures and where will be learned with the action"),
])
def test_what_weakens_the_action_is_said(values, warning, caplog):
    with caplog.at_level(logging.WARNING):
        train(**values)
    said = [record.message for record in caplog.records if "Train Action Identifier" in record.message]
    # The doctor's lines on the pictures are tested where it is.
    said = [line for line in said if "does not know" in line or "learned with the action" in line]
    assert len(said) == (warning is not None) and (not said or warning in said[0])


def test_a_prompt_takes_as_many_actions_as_comfyui_allows():
    template = next(i for i in UnderstudyEncodeAction.define_schema().inputs if i.id == "actions").template
    assert (template.min, template.max) == (1, io.Autogrow._MaxNames)


def test_a_word_that_the_action_shares_is_not_drawn_against_it():
    config = training.ActionTrainingConfig
    assert config(initial_word="jumping", contrast_words="standing, jumping").contrasts == ["standing"]
    assert config(initial_word="jumping", contrast_words="jumping").contrasts == ["jumping"]


def encode(text, *actions, identity=None):
    with torch.inference_mode():
        connected = {f"action{i}": action for i, action in enumerate(actions)}
        return UnderstudyEncodeAction.execute(CLIP, text, connected, identity).result[0]


def sample(model, positive, sampler=EULER):
    return tiny_model.sample(model, sampler, positive=positive, negative=action_identifiers.plain(CLIP, ""), steps=3)


def test_a_trained_action_an_identity_s_subject_and_frequency_guidance_in_one_graph():
    action, _ = train()
    identity = Subject("sks", "robot")
    positive = encode("a {subject} <action>, on a beach", action, identity=identity)
    assert torch.equal(positive[0][0], action_identifiers.plain(CLIP, "a sks robot dancing, on a beach")[0][0])
    (model,) = UnderstudyApplyActionIdentifier.execute(MODEL, 1.0).result
    latents = [{"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i))} for i in (1, 2)]
    widgets = {widget.id: widget.default for widget in UnderstudyFrequencyGuidanceSampler.GET_SCHEMA().inputs[3:9]}
    (guided,) = UnderstudyFrequencyGuidanceSampler.execute(EULER, *latents, **widgets).result
    with_all = sample(model, positive, guided)
    for other in (sample(model, positive), sample(MODEL, positive_of_word(), guided)):
        assert torch.isfinite(with_all).all() and (with_all - other).abs().max() > 1e-2 * other.std()
    (stepwise,) = UnderstudyStepwisePrompt.execute(
        target=positive_of_word(), driving=positive, switch_percent=0.5
    ).result
    assert not torch.equal(sample(model, stepwise), sample(model, positive))


def positive_of_word():
    return action_identifiers.plain(CLIP, "a sks robot dancing, on a beach")


def test_several_actions_in_a_prompt_each_count():
    one, two = (action_identifiers.identifier(MODEL, seed=i, placeholder=f"<{i}>") for i in (1, 2))
    model = sampling.apply(MODEL, 1.0)
    both = sample(model, encode("a cat <1> and a dog <2>", one, two))
    third = action_identifiers.identifier(MODEL, seed=3, placeholder="<2>")
    assert (both - sample(model, encode("a cat <1> and a dog <2>", one, third))).abs().max() > 1e-2 * both.std()
    with pytest.raises(ValueError, match="text does not contain <2>"):
        encode("a cat <1>", one, two)


def test_a_model_without_cross_attention_is_refused():
    class Other:
        model = types.SimpleNamespace(model_config=object())

        def get_model_object(self, _name):
            return torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="action identifiers need layers that read nothing but the text"):
        UnderstudyApplyActionIdentifier.execute(Other(), 1.0)
