"""The rival networks of the experiment: unchanged they equal our nodes, and each changes what its name says."""

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from experiments import video_identity_variants as variants
from support import published_wan, tiny_model
from support.video_identities import ADAPTER, MODEL, person, picture_latent, relative, sample, shown

LATENT = picture_latent()


def through(kind, **options):
    return sample(variants.applied(kind, MODEL, ADAPTER.tensors(), LATENT), **options)


def test_the_unchanged_network_samples_what_our_nodes_sample():
    ours = sample(shown(MODEL, person(latent=LATENT)))
    assert relative(ours, through(published_wan.Wan)) < 1e-4
    assert relative(ours, sample(MODEL)) > 1e-2


@pytest.mark.parametrize("kind", variants.VARIANTS.values())
def test_a_variant_is_neither_ours_nor_the_plain_model(kind):
    actual = through(kind)
    assert relative(actual, through(published_wan.Wan)) > 1e-3 and relative(actual, sample(MODEL)) > 1e-3


def test_a_first_frame_is_clean_at_timestep_0_and_leaves_the_video_its_length():
    latent, seen = picture_latent(height=8, width=6), []
    patched = variants.as_first_frame(MODEL, latent)

    def look(execute, x, timesteps, *rest, **named):
        seen.append((x[:, :, :1], timesteps))
        return execute(x, timesteps, *rest, **named)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    actual, plain = sample(patched), sample(MODEL)
    assert actual.shape == plain.shape and relative(actual, plain) > 1e-3
    image = MODEL.model.process_latent_in(latent.clone())
    for first, timesteps in seen:
        assert torch.equal(first, image.expand_as(first)) and (timesteps[:, 0] == 0).all()
        assert (timesteps[:, 1:] > 0).all() and (timesteps[:, 1:] == timesteps[:, 1:2]).all()


@pytest.mark.parametrize("kind", [published_wan.Wan, *variants.VARIANTS.values()])
def test_training_learns_for_the_variant(kind):
    """Gradients of one step reach every projection, and differ from those of our own attention."""
    from pack.nodes.training.config import TrainingConfig
    from pack.nodes.training.objective import DenoisingObjective, Sample
    from pack.nodes.training.session import session
    from pack.nodes.video_identity import sampling, training

    def gradients(variant):
        config = TrainingConfig(1, 1e-3, dtype="fp32")
        latent = torch.randn(1, 16, 3, 8, 6, generator=torch.Generator().manual_seed(5))
        with session(sampling.with_block_patches(MODEL), [1, *latent.shape[1:]], config) as denoiser:
            adapter = training._mapped(ADAPTER, lambda tensor: torch.nn.Parameter(tensor.detach().float().clone()))
            conditions = denoiser.prepare([[torch.ones(1, 4, tiny_model.CONTEXT), {}]], latent)
            conditions[training._REFERENCE] = LATENT.clone()
            objective = DenoisingObjective(variant(denoiser, adapter), [Sample(latent, conditions)], config)
            objective(0, torch.Generator().manual_seed(1)).backward()
            return {name: tensor.grad for name, tensor in adapter.tensors().items()}

    ours = gradients(training.WithReferences)
    with variants.trained_with(kind):
        theirs = gradients(training.WithReferences)
    distance = max(relative(theirs[name], ours[name]) for name in ours if ours[name] is not None)
    assert distance < 1e-3 if kind is published_wan.Wan else distance > 1e-2
    assert all(theirs[name] is not None and theirs[name].any() for name in theirs if ours[name] is not None)
