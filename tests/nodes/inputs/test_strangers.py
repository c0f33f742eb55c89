"""Photographs for the theatre's models, told by the latents of their own encoder, wherever one goes in."""

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from pack.nodes.files.folders import WeightFolder
from pack.nodes.frequency_guidance.config import FrequencyGuidanceConfig
from pack.nodes.frequency_guidance.nodes import UnderstudyFrequencyGuidanceSampler
from pack.nodes.fusion_embedding import files
from pack.nodes.fusion_embedding.nodes import UnderstudyCombineFusion
from pack.nodes.identity_prior.nodes import UnderstudyEncodeIdentity, UnderstudyInvertImage
from pack.nodes.inputs import strangers
from pack.nodes.puppets import menus
from pack.nodes.puppets.nodes import UnderstudyPuppet
from pack.nodes.subject_tokens import Subject
from pack.nodes.video_identity import files as adapters
from pack.nodes.video_identity.config import VideoIdentityConfig
from pack.nodes.video_identity.nodes import UnderstudyApplyVideoIdentity
from support import fusions, tiny_model

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
    assert line.startswith("latent (3 of 3) looks like no puppet: for people open a template whose name begins with")
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
    assert "Frequency Guidance Sampler: source looks like no puppet" in caplog.text, "also where it is off"


def photograph(side=128):
    """Somebody bright with skin, hair and cloth, which have edges everywhere, [1, H, W, 3]."""
    texture = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(4))
    return (portrait(side) + 0.25 * texture).clamp(0, 1)


@pytest.fixture
def shipped(monkeypatch):
    """Load functions find the theatre's own files."""
    monkeypatch.setattr(WeightFolder, "find", lambda folder, name: menus.MODELS / folder.name / name)


def test_combine_fusion_says_that_a_photograph_is_no_puppet(shipped, caplog):
    fusion = files.load("puppets_fusion.safetensors")[0]
    puppet, _, pose, _ = UnderstudyPuppet.execute("test 7", "standing", "stage", 1, 31).result
    UnderstudyCombineFusion.execute(fusion, puppet, pose)
    assert not caplog.messages
    large = F.interpolate(photograph().movedim(-1, 1), (512, 384)).movedim(1, -1)
    UnderstudyCombineFusion.execute(fusion, torch.cat([puppet, photograph()]), pose)
    assert "Combine Fusion: source (2 of 2) looks like no puppet" in caplog.text
    assert strangers.of_pictures(large, "source", fusion.encoder)
    assert not strangers.of_pictures(large, "source", fusions.vision()), "another encoder knows people"


def test_apply_video_identity_says_that_a_photograph_is_no_puppet(shipped, caplog):
    model = comfy.sd.load_diffusion_model(str(menus.MODELS / "diffusion_models" / "puppets_wan.safetensors"))
    state, metadata = comfy.utils.load_torch_file(
        str(menus.MODELS / "vae" / "puppets_wan_vae.safetensors"), return_metadata=True
    )
    vae, adapter = comfy.sd.VAE(sd=state, metadata=metadata), adapters.load("puppets_wan_identity.safetensors")
    puppet = UnderstudyPuppet.execute("test 5", "waving", "forest", 1, 3, size=96, framing="close_up").result[0]
    for picture, told in ((puppet, False), (photograph(96), True), (portrait(96), True)):
        caplog.clear()
        latent = {"samples": vae.encode(picture)}
        UnderstudyApplyVideoIdentity.execute(model, adapter, latent, **vars(VideoIdentityConfig()))
        assert ("Apply Video Identity: reference looks like no puppet" in caplog.text) is told
