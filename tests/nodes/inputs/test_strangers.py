"""Photographs for the theatre's models, told by the latents of their own encoder, wherever one goes in."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler
from pack.nodes.identity_prior.nodes import UnderstudyEncodeIdentity, UnderstudyInvertImage
from pack.nodes.inputs import strangers
from pack.nodes.puppets.nodes import UnderstudyPuppet
from pack.nodes.subject_tokens import Subject
from support import tiny_model

SIGMAS = torch.tensor([2.0, 1.0, 0.0])


@pytest.fixture(autouse=True, scope="module")
def as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


def portrait(side=128):
    """Somebody bright against the dark, softly lit, [1, H, W, 3]."""
    across = torch.linspace(-1, 1, side)
    distance = torch.hypot(across[:, None], across)
    return ((distance < 0.9) * (0.8 - 0.3 * distance))[None, ..., None] * torch.tensor([1.0, 0.45, 0.15])


@pytest.fixture(scope="module")
def latents(loaded, as_comfyui_runs_nodes):
    """Of two puppets, in full and close, and of the portrait; [1, 16, 16, 16] each."""
    takes = ("test 3", "waving", "beach", 1, 0), ("test 5", "nodding", "night", 1, 4)
    framings = "full", "close_up"
    pictures = [
        UnderstudyPuppet.execute(*take, framing=framing).result[0]
        for take, framing in zip(takes, framings, strict=True)
    ]
    return [loaded[2].encode(picture) for picture in (*pictures, portrait())]


def test_puppets_pass_and_a_portrait_is_named_by_its_number(loaded, latents):
    config, batch = loaded[0].model.model_config, torch.cat(latents)
    (line,) = strangers.warnings(batch, "latent", config)
    assert line.startswith("latent (3 of 3) looks like no puppet") and "open a template whose name begins" in line
    assert strangers.warnings(batch[:2], "latent", config) == []
    assert strangers.warnings(latents[2], "driving", config)[0].startswith("driving looks like no puppet")
    assert strangers.warnings(latents[2], "latent", tiny_model.picture().model.model_config) == []


@pytest.mark.parametrize(("shown", "told"), [(0, False), (2, True)], ids=["puppet", "portrait"])
def test_the_nodes_say_so(loaded, latents, shown, told, caplog):
    model, clip, _ = loaded
    (positive,) = UnderstudyEncodeIdentity.execute(clip, Subject("sks", "robot"), "a {subject} waving").result
    picture = {"samples": latents[shown]}
    UnderstudyInvertImage.execute(model, positive, picture, SIGMAS, "ddim", 1, 0.25)
    assert ("Invert Image: latent looks like no puppet" in caplog.text) is told
    settings = {**vars(FrequencyGuidanceConfig()), "amplitude_scale": 0.0, "phase_scale": 0.5}
    euler = comfy.samplers.sampler_object("euler")
    (guided,) = UnderstudyFrequencyGuidanceSampler.execute(euler, {"samples": latents[2]}, picture, **settings).result
    noise = torch.zeros_like(latents[0])
    comfy.sample.sample_custom(model, noise, 1.0, guided, SIGMAS, positive, positive, noise, disable_pbar=True)
    assert ("Frequency Guidance Sampler: driving looks like no puppet" in caplog.text) is told
    assert "source looks" not in caplog.text, "what is off counts for nothing"
