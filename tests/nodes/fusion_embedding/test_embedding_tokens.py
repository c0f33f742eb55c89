"""Tokens of the fusion embedding beside the class embedding: against a formula, in training, files and sampling."""

import comfy.samplers
import pytest
import torch
from pack.nodes.fusion_embedding import files, layout, method, sampling
from pack.nodes.fusion_embedding.config import ApplyConfig, GeneratorConfig
from pack.nodes.fusion_embedding.method import FusionError
from support import fusions, tiny_model
from support.fusion_trainings import MODEL, generated

COUNT = 3


def with_tokens(seed=0):
    sizes = sampling.model_sizes(MODEL, fusions.HIDDEN, fusions.WIDTH, COUNT)
    return layout.new_generator(sizes, 9, (4, 6, 8, 10), fusions.generator(seed))


def test_they_are_a_projection_with_a_norm_of_its_own():
    weights, fused = with_tokens(), fusions.fused(2)
    width = layout.generator_sizes(weights).context
    weights["embedding_tokens.norm.weight"] = 1 + torch.rand(width, generator=fusions.generator(1))
    tokens = method.embedding_tokens(weights, fused)
    assert tokens.shape == (2, COUNT, width)
    matrix, bias = (weights[f"embedding_tokens.projection.{part}"].double() for part in ("weight", "bias"))
    for row in range(2):
        flat = matrix @ fused[row].double() + bias
        for i in range(COUNT):
            part = flat[i * width : (i + 1) * width]
            scaled = (part - part.mean()) / (part.var(unbiased=False) + 1e-5).sqrt()
            expected = scaled * weights["embedding_tokens.norm.weight"]
            torch.testing.assert_close(tokens[row, i].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_unet_reads_them_after_the_appearance_and_not_where_fusion_is_left_out():
    weights, fused, states, pose = with_tokens(), fusions.fused(2), fusions.states(1), fusions.poses(2).movedim(-1, 1)
    inputs = method.unet_inputs(weights, states, fused, pose)
    plain = {key: value for key, value in weights.items() if not key.startswith("embedding_tokens.")}
    without = method.unet_inputs(plain, states, fused, pose)
    count = without.tokens.shape[1]
    assert inputs.tokens.shape == (2, count + COUNT, without.tokens.shape[2])
    torch.testing.assert_close(inputs.tokens[:, :count], without.tokens.expand(2, -1, -1))
    torch.testing.assert_close(inputs.tokens[:, count:], method.embedding_tokens(weights, fused))
    keep = {"source": torch.tensor([1.0, 0.0]), "fusion": torch.tensor([0.0, 1.0]), "pose": torch.ones(2)}
    dropped = method.unet_inputs(weights, states, fused, pose, keep).tokens
    assert not dropped[0, count:].any() and dropped[0, :count].any()
    assert dropped[1, count:].any() and not dropped[1, :count].any()
    assert not method.left_out(weights, inputs).tokens.any()


def test_training_moves_them_and_a_file_keeps_them():
    fusion, _ = generated(steps=2, generator={"embedding_tokens": COUNT})
    start = with_tokens()
    for key in ("embedding_tokens.projection.weight", "embedding_tokens.norm.weight"):
        assert fusion.generator[key].shape == start[key].shape
    assert not torch.equal(fusion.generator["embedding_tokens.norm.weight"], torch.ones(start[
        "embedding_tokens.norm.weight"].shape))
    loaded = files.unpacked(*files.packed(fusion))
    assert all(torch.allclose(loaded.generator[key].float(), v, atol=1e-2) for key, v in fusion.generator.items())
    assert layout.generator_sizes(loaded.generator).embedding_tokens == COUNT


def test_another_embedding_changes_the_picture_through_the_tokens_alone():
    """The class embedding starts at 0, so that only the tokens can tell."""
    weights = with_tokens()
    euler, pictures = comfy.samplers.sampler_object("euler"), []
    for seed in (0, 1):
        fusion = fusions.fusion(MODEL, generator=weights, unet=None, unet_kind="")
        model, positive, negative = sampling.apply(
            MODEL, fusion, fusions.states(), fusions.fused(seed=seed), fusions.poses(), ApplyConfig()
        )
        pictures.append(tiny_model.sample(model, euler, positive=positive, negative=negative, steps=2))
    assert (pictures[0] - pictures[1]).abs().mean() > 1e-3


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("embedding_tokens.norm.bias"), "embedding_tokens.norm.bias"),
    (lambda w: w.update({"embedding_tokens.projection.weight": torch.zeros(7, fusions.WIDTH)}), "embedding_tokens"),
])
def test_a_file_with_a_part_of_them_is_refused(change, message):
    weights = with_tokens()
    change(weights)
    with pytest.raises(FusionError, match=message):
        layout.generator_sizes(weights)


def test_their_number_has_limits():
    with pytest.raises(ValueError, match="embedding_tokens is 17"):
        GeneratorConfig(embedding_tokens=17)
