"""Texts and latents against the model that reads them, for each kind of model whose structure tells its width."""

import pytest
import torch
from pack.nodes.inputs.model_fit import check_latents, check_texts, text_width
from support import real_configurations, tiny_model

MODELS = [(tiny_model.picture(), 16), (tiny_model.xl(), 40), (tiny_model.wan(), 16)]
REAL = {"SD 1.5": 768, "SD 2.1": 1024, "SDXL": 2048, "Wan 2.1 1.3B": 4096}


@pytest.mark.parametrize(("model", "width"), MODELS)
def test_the_width_of_a_text_is_in_the_model(model, width):
    assert text_width(model.get_model_object("diffusion_model")) == width
    check_texts([[[torch.zeros(1, 7, width), {}]]], "clip", model)
    with pytest.raises(ValueError, match=f"^positive encodes texts in 8 channels and the model reads {width}"):
        check_texts([[[torch.zeros(1, 7, 8), {}]]], "positive", model)


@pytest.mark.parametrize(("name", "width"), REAL.items())
def test_the_width_of_a_text_is_in_real_models(name, width):
    assert text_width(real_configurations.build(name).diffusion_model) == width


def test_a_model_that_does_not_say_refuses_nothing():
    assert text_width(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None


def test_latents_have_the_models_channels_and_dimensions():
    check_latents([torch.zeros(1, 4, 8, 8)], "latent", tiny_model.picture())
    check_latents([torch.zeros(1, 16, 2, 8, 8)], "latent", tiny_model.wan())
    with pytest.raises(ValueError, match="^latent has 16 channels and the model's latents have 4: encode"):
        check_latents([torch.zeros(1, 16, 8, 8)], "latent", tiny_model.picture())
    with pytest.raises(ValueError, match=r"^latent has shape \(1, 16, 8, 8\) .* \[B, 16, T, H, W\]: encode"):
        check_latents([torch.zeros(1, 16, 8, 8)], "latent", tiny_model.wan())
