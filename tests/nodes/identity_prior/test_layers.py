"""Which cross-attentions of the real models are watched: their shapes alone, on the meta device."""

from types import SimpleNamespace

import pytest
from pack.nodes.identity_prior import capture
from pack.nodes.identity_prior.config import MaskConfig
from support.real_configurations import build

# Latent cells of each layer's cells, written down from the published models: three levels down and up again.
FOUR_LEVELS = [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
FACTORS = {
    "SD 1.5": FOUR_LEVELS, "SD 2.1": FOUR_LEVELS, "SDXL": [2] * 4 + [4] * 60 + [2] * 6,
    "Wan 2.1 1.3B": [2] * 30, "Wan 2.1 14B": [2] * 40,
}
# The longer side of latents of 512, 768, 1024, 256 and 832 pixels.
AUTO = [
    ("SD 1.5", 64, {4, 5, 7, 8, 9}), ("SD 2.1", 96, {4, 5, 7, 8, 9}), ("SD 1.5", 128, {4, 5, 7, 8, 9}),
    ("SDXL", 128, {4, 19, 34, 48, 63}), ("SD 1.5", 32, {4, 5, 7, 8, 9}),
    ("Wan 2.1 1.3B", 104, {10, 12, 14, 17, 19}), ("Wan 2.1 14B", 104, {13, 16, 19, 23, 26}),
]


def layers(name):
    network = build(name).diffusion_model
    return capture.layers_of(SimpleNamespace(get_model_object=lambda _key: network))


@pytest.mark.parametrize("name", FACTORS)
def test_every_cross_attention_is_known_with_its_cells(name):
    found = layers(name)
    assert [layer.factor for layer in found] == FACTORS[name]
    assert len({layer.place for layer in found}) == len(found)
    if name.startswith("SD"):
        assert found[0].place == ("input", 4 if name == "SDXL" else 1, 0)
        assert found[-1].place == ("output", 5 if name == "SDXL" else 11, 1 if name == "SDXL" else 0)


@pytest.mark.parametrize(("name", "side", "expected"), AUTO)
def test_auto_takes_five_layers_of_the_coarsest_or_in_the_middle(name, side, expected):
    found = layers(name)
    assert capture.chosen_layers(found, MaskConfig(), side) == expected
    assert len(capture.chosen_layers(found, MaskConfig(layers="all"), side)) == len(found)
    assert capture.chosen_layers(found, MaskConfig(layers="0-2"), side) == {0, 1, 2}
