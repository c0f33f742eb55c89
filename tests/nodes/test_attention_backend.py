"""ComfyUI's Model Attention Backend, of 0.33 and later, before and after our nodes: both act, in either order."""

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras import nodes_model_advanced
from pack.nodes.identity_prior import attention
from pack.nodes.reference_weight.nodes import UnderstudyReferenceWeight
from support import families, family_models, tiny_model
from support import video_identities as video

BACKEND = getattr(nodes_model_advanced, "ModelAttentionBackend", None)
pytestmark = pytest.mark.skipif(BACKEND is None, reason="this ComfyUI has no Model Attention Backend")
X = video.draw(2, *video.SHAPE)


def with_backend(model):
    return BACKEND().patch(model, "pytorch attention")[0]


def counting(model):
    """As that node patches, with a count of what it computes."""
    model, calls = model.clone(), []
    model.set_model_optimized_attention(lambda *args, **named: calls.append(1) or attention_pytorch(*args, **named))
    return model, calls


def estimate(model, family):
    """One step from noise, with two reference pictures."""
    pictures = [video.draw(21 + i, 1, *family.latent) for i in range(2)]
    prompt = family_models.conditioning(family, 1, families.TOKENS, reference_latents=pictures)
    sigmas = torch.tensor([0.7, 0.0])
    return tiny_model.sample(
        model, video.EULER, shape=family.shape, sigmas=sigmas, cfg=1.0, positive=prompt, negative=prompt
    )


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}])
def test_beside_a_video_identity(settings):
    expected = video.call(video.shown(**settings), X)
    for patched in (with_backend(video.shown(**settings)), video.shown(with_backend(video.MODEL), **settings)):
        assert video.relative(video.call(patched, X), expected) < 1e-5
    assert video.relative(expected, video.call(video.MODEL, X)) > 1e-2
    counted, calls = counting(video.MODEL)
    video.call(video.shown(counted, **settings), X)
    # Two blocks of the reference; then text, and without a strength the video itself, in each of three.
    assert len(calls) == 2 + (3 if settings else 6)


def test_beside_guidance_by_the_reference():
    expected = video.sample(video.shown(reference_guidance=1.5))
    for patched in (with_backend(video.shown(reference_guidance=1.5)),
                    video.shown(with_backend(video.MODEL), reference_guidance=1.5)):
        assert video.relative(video.sample(patched), expected) < 1e-5


def test_beside_the_recorder_of_an_identity_prior():
    seen = []

    class Recorder:
        def record(self, index, q, k, heads, options):
            seen.append(index)

    for patched in (attention.with_recorder(with_backend(video.MODEL)),
                    with_backend(attention.with_recorder(video.MODEL))):
        result = video.call(patched, X, options={attention.KEY: Recorder()})
        assert seen == [0, 1, 2] and video.relative(result, video.call(video.MODEL, X)) < 1e-5
        seen.clear()


@pytest.mark.parametrize("name", ["Flux.1", "Flux.2", "Qwen-Image", "Krea 2"])
def test_beside_a_reference_weight(name):
    family = next(family for family in families.FAMILIES if family.name == name)
    plain = family_models.build(family)

    def weighed(model):
        return UnderstudyReferenceWeight.execute(model, 2, 0.3, 0.0, 1.0, "all", None).result[0]

    expected = estimate(weighed(plain), family)
    for patched in (weighed(with_backend(plain)), with_backend(weighed(plain))):
        assert video.relative(estimate(patched, family), expected) < 1e-4
    assert not torch.allclose(expected, estimate(plain, family), rtol=1e-3)
