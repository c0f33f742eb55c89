"""Latents that are refused, with messages that name the input."""

import pytest
import torch
from comfy.nested_tensor import NestedTensor
from pack.nodes.inputs import latents


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(("latent", "message"), [
    (ones(1, 64, 100), "source is not an image or video latent: connect VAE Encode to `source`"),
    (NestedTensor([ones(1, 4, 8, 8), ones(1, 4, 2, 8)]), "source is not an image or video latent"),
    (ones(0, 4, 8, 8), "source is an empty batch: connect VAE Encode of at least one picture"),
    (ones(1, 4, 0, 8), "source is an empty batch"),
    (ones(2, 4, 8, 8).index_fill_(3, torch.tensor([7]), float("inf")), "source holds NaN or infinite.*VAE in fp32"),
    (ones(1, 4, 3, 8, 8) * float("nan"), "source holds NaN or infinite values"),
])
def test_latents_that_show_nothing_are_refused(latent, message):
    with pytest.raises(ValueError, match=message):
        latents.check_latent(latent, "source")


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 16, 5, 8, 6), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_of_pictures_and_videos_pass(shape, dtype):
    latent = ones(*shape).to(dtype)
    latents.check_latent(latent, "source")
    latents.check_not_zero(latent, "source")
    latents.check_channels(latent, "source", shape[1])
    latents.check_batch(len(latent), 3, "source", "latent")


def test_what_does_not_fit_names_both_sides():
    with pytest.raises(ValueError, match="source is all zero, as Empty Latent Image makes it"):
        latents.check_not_zero(torch.zeros(1, 4, 8, 8), "source")
    with pytest.raises(ValueError, match="source has 16 channels and the model's latents have 4: encode it with"):
        latents.check_channels(ones(1, 16, 8, 8), "source", 4)
    with pytest.raises(ValueError, match="have 4: invert again"):
        latents.check_channels(ones(1, 16, 8, 8), "inversion", 4, "invert again")
    for batch, end in ((1, "one mask$"), (3, "one mask, or 3$")):
        with pytest.raises(ValueError, match=f"mask holds 2 masks and the batch is {batch}: connect {end}"):
            latents.check_batch(2, batch, "mask", "mask")
