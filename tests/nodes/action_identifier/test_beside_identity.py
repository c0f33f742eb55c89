"""An action and an identity's subject in one prompt: the blend finds the subject, frequency guidance joins in."""

import comfy.samplers
import pytest
import torch
from pack.nodes.action_identifier import encoding, sampling
from pack.nodes.action_identifier.method import ANY_ENCODER, ActionIdentifier
from pack.nodes.action_identifier.nodes import UnderstudyApplyActionIdentifier, UnderstudyEncodeAction
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler
from pack.nodes.identity_prior.nodes import (
    UnderstudyEditMasks,
    UnderstudyEncodeIdentity,
    UnderstudyIdentityMaskBlend,
    UnderstudyInvertImage,
)
from pack.nodes.puppets import theatre
from pack.nodes.subject_tokens import Subject, tagged_positions
from support import action_identifiers, tiny_clip, tiny_model

IDENTITY = Subject("sks", "robot")
EULER = comfy.samplers.sampler_object("euler")
STEPS, SHAPE = 4, (1, 16, 16, 16)


def encode(clip, text, *actions, identity=IDENTITY):
    with torch.inference_mode():
        connected = {f"action{i}": action for i, action in enumerate(actions)}
        return UnderstudyEncodeAction.execute(clip, text, connected, identity).result[0]


def encode_identity(clip, text):
    with torch.inference_mode():
        return UnderstudyEncodeIdentity.execute(clip, IDENTITY, text).result[0]


def latent(seed):
    return {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize(("count", "text"), [
    (1, "a {subject} <action> on a beach"), (1, "<action> a {subject}"), (3, "<action> a {subject} <action>"),
    (2, "a (cat <action>:1.2) and a (big {subject}:0.9)"),
])
def test_the_subject_is_where_the_layers_read_it(count, text):
    """They equal those of Encode Identity for a text with as many words as the action has tokens."""
    clip = tiny_clip.clip()
    tokens = torch.randn(1, count, tiny_clip.WIDTHS["SD 1.5"]["l"], generator=torch.Generator().manual_seed(1))
    action = ActionIdentifier("<action>", "dancing", {ANY_ENCODER: tokens})
    actual = tagged_positions(encode(clip, text, action))
    assert actual == tagged_positions(encode_identity(clip, text.replace("<action>", " ".join(["zebra"] * count))))
    assert len(actual) == len(encoding.word_ids(clip.tokenize, IDENTITY.trigger)["l"])


def test_a_prompt_without_the_subject_names_none():
    clip = tiny_clip.clip()
    action = action_identifiers.identifier(tiny_model.picture())
    assert tagged_positions(encode(clip, "a robot <action>", action)) == ()
    with pytest.raises(ValueError, match="text contains {subject}: connect `identity`"):
        encode(clip, "a {subject} <action>", action, identity=None)


def blended(loaded, positive, sampler=EULER):
    """(latent, source mask, edited mask) of an edit with this prompt, its picture inverted under another."""
    model, clip, _ = loaded
    (model,) = UnderstudyApplyActionIdentifier.execute(model, 1.0).result
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    with torch.inference_mode():
        actual, noise, _ = UnderstudyInvertImage.execute(
            model, encode_identity(clip, "a {subject} standing on a beach"), latent(1), sigmas, "ddim", 1, 0.5,
        ).result
        (patched,) = UnderstudyIdentityMaskBlend.execute(model, actual, positive, 0.5, 0, 0.0, 1.0).result
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(positive, clip.encode_from_tokens_scheduled(clip.tokenize("")))
        guider.set_cfg(3.0)
        samples = guider.sample(
            noise.generate_noise(latent(1)), latent(1)["samples"], sampler, sigmas, disable_pbar=True, seed=3
        )
        masks = UnderstudyEditMasks.execute(patched, {"samples": samples}).result
    return samples, *masks


def test_the_blend_finds_the_subject_of_a_prompt_with_an_action(loaded):
    """Tokens that are a word's own in every layer make the edit, and the masks, of the prompt with that word."""
    model, clip, _ = loaded
    places = sampling.places(model.get_model_object("diffusion_model"))
    with torch.inference_mode():
        word = {e: v.repeat(len(places), 1, 1) for e, v in encoding.word_vectors(clip, "jumping").items()}
    action = ActionIdentifier("<action>", "dancing", word, places)
    ours = blended(loaded, encode(clip, "a {subject} <action> on a beach", action))
    words = blended(loaded, encode_identity(clip, "a {subject} jumping on a beach"))
    torch.testing.assert_close(ours[0], words[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[1], words[1]) and torch.equal(ours[2], words[2])
    assert 0 < float(ours[2].mean()) < 1


def test_a_prior_s_subject_an_action_and_frequency_guidance_act_together_on_the_theatre(loaded):
    model, clip, _ = loaded
    places = sampling.places(model.get_model_object("diffusion_model"))
    generator = torch.Generator().manual_seed(5)
    tokens = {"l": torch.randn(len(places), 1, theatre.TEXT_WIDTH, generator=generator)}
    action = ActionIdentifier("<action>", "dancing", tokens, places)
    widgets = {widget.id: widget.default for widget in UnderstudyFrequencyGuidanceSampler.GET_SCHEMA().inputs[3:9]}
    (guided,) = UnderstudyFrequencyGuidanceSampler.execute(EULER, latent(2), latent(3), **widgets).result
    prompt = encode(clip, "a {subject} <action> on a beach", action)
    together, source, edited = blended(loaded, prompt, guided)
    assert torch.isfinite(together).all() and 0 < float(edited.mean()) < 1
    without_action = blended(loaded, encode_identity(clip, "a {subject} dancing on a beach"), guided)[0]
    for other in (blended(loaded, prompt)[0], without_action):
        assert (together - other).abs().max() > 1e-2 * other.std()
    # Outside both masks every one of them ends on the inverted picture.
    outside = (source + edited == 0)[:, ::8, ::8].unsqueeze(1).expand(SHAPE)
    assert outside.any()
    torch.testing.assert_close(together[outside], latent(1)["samples"][outside], rtol=1e-3, atol=1e-3)
