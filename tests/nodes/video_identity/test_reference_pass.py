"""The reference's pass: its keys and values against the published formulas, and where it stops."""

from unittest import mock

import comfy.model_management
import pytest
import torch
from pack.nodes.video_identity import method, reference_pass
from support import published_wan, tiny_model


def latent(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_and_values(blocks, interrupted_after=None):
    """Our pass, the published model's own keys and values of the image in every block, by loops, and our blocks.

    With `interrupted_after` the run is interrupted when the pass has begun this many blocks.
    """
    model = tiny_model.wan(seed=3)
    adapter = tiny_model.video_adapter(model)
    network = model.model.diffusion_model
    published = published_wan.Wan(network.state_dict(), 2, 32, adapter, loops=True)
    reference = latent(1, 1, 16, 1, 6, 4)
    published(latent(2, 1, 16, 2, 4, 6), torch.tensor([700.0]), latent(3, 1, 4, 16), reference)
    begun = []
    for i, block in enumerate(network.blocks):
        block.norm1.register_forward_pre_hook(lambda *_call, i=i: begun.append(i))

    def interrupt():
        if len(begun) == interrupted_after:
            raise comfy.model_management.InterruptProcessingException

    interrupts = mock.patch.object(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with torch.no_grad(), interrupts:
        kv = reference_pass.reference_kv(
            model.model, method.adapter_from(adapter), reference, blocks=blocks, video_size=(2, 3), options={}
        )
    return kv, published.attended, begun


def test_the_pass_gives_the_published_keys_and_values():
    kv, published, _ = keys_and_values(frozenset((0, 1, 2)))
    assert sorted(kv) == [0, 1, 2] and len(published) == 3
    for i, expected in enumerate(published):
        for ours, theirs in zip(kv[i], expected, strict=True):
            assert ours.shape == (1, 6, 2, 24)
            relative = (ours.flatten(2) - theirs).abs().max() / theirs.abs().max()
            assert relative < 1e-5, (i, relative)


def test_the_pass_keeps_only_what_is_asked_for_and_stops_after_the_last():
    everything, _, begun = keys_and_values(frozenset((0, 1, 2)))
    assert begun == [0, 1, 2]
    kv, _, begun = keys_and_values(frozenset((1,)))
    assert list(kv) == [1] and torch.equal(kv[1][0], everything[1][0]) and begun == [0, 1]
    keys_and_values(frozenset((1,)), interrupted_after=3)  # block 2 is never begun
    for blocks_begun in (0, 1, 2):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            keys_and_values(frozenset((1,)), interrupted_after=blocks_begun)
