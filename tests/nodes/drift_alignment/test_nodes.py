"""The node in ComfyUI: its inputs, lists and batches, errors in words."""

import asyncio

import comfy.nested_tensor
import execution
import pytest
import torch
from pack.nodes.drift_alignment import method
from pack.nodes.drift_alignment.config import DriftAlignmentConfig
from pack.nodes.drift_alignment.nodes import UnderstudyAlignLatentDrift

SETTINGS = {"cutoff": 0.3, "momentum": 0.5, "strength": 1.0}


def latent(seed, *shape, **extra):
    noise = torch.randn(shape or (1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    return {"samples": noise + seed, **extra}


def run(new, *earlier, **settings):
    """As ComfyUI calls a node whose inputs are lists: each connected socket, and each widget, is one."""
    values = {name: [value] for name, value in {**SETTINGS, **settings}.items()}
    rounds = {f"round{i}": each if isinstance(each, list) else [each] for i, each in enumerate(earlier)}
    return UnderstudyAlignLatentDrift.execute([new], rounds, **values).result[0]


def low_mean(samples):
    return samples.flatten(2).mean(-1)


def test_the_schema_is_valid_and_agrees_with_the_config():
    UnderstudyAlignLatentDrift.GET_SCHEMA().validate()
    inputs = {widget.id: widget for widget in UnderstudyAlignLatentDrift.define_schema().inputs}
    assert list(inputs) == ["latent", "earlier", "cutoff", "momentum", "strength", "mask"]
    defaults = DriftAlignmentConfig()
    assert {name: inputs[name].default for name in SETTINGS} == {name: getattr(defaults, name) for name in SETTINGS}
    assert inputs["earlier"].template.min == 1 and inputs["mask"].optional


def test_comfyui_hands_single_rounds_and_lists_of_rounds_over_in_order():
    """Through ComfyUI's own mapping of lists and growing inputs."""
    new, *rounds = (latent(seed) for seed in range(4))
    expected = run(new, *rounds)["samples"]
    paths = {f"earlier.round{i}": f"earlier.round{i}" for i in range(2)}
    data = {
        "latent": [new], "earlier.round0": rounds[:2], "earlier.round1": rounds[2:],
        **{name: [value] for name, value in SETTINGS.items()},
    }
    result = asyncio.run(execution._async_map_node_over_list(
        "prompt", "1", UnderstudyAlignLatentDrift, data, "execute",
        v3_data={"dynamic_paths": paths, "hidden_inputs": {}},
    ))
    assert torch.equal(result[0].result[0]["samples"], expected)
    assert torch.equal(run(new, rounds)["samples"], expected)
    assert not torch.allclose(run(new, *rounds[::-1])["samples"], expected)


def test_strength_0_is_the_latent_itself_and_other_keys_pass():
    new = latent(1, noise_mask=torch.ones(1, 64, 64), batch_index=[3])
    assert run(new, latent(2), strength=0.0) is new
    before = new["samples"].clone()
    result = run(new, latent(2))
    assert result is not new and torch.equal(new["samples"], before)
    assert list(result) == list(new)
    assert [key for key in result if result[key] is new[key]] == ["noise_mask", "batch_index"]


def test_momentum_decides_between_the_first_and_the_last_round():
    new, first, last = (latent(seed) for seed in (1, 2, 3))
    for momentum, only in ((1.0, first), (0.0, last)):
        result = run(new, first, last, momentum=momentum)["samples"]
        torch.testing.assert_close(result, run(new, only)["samples"])
        torch.testing.assert_close(low_mean(result), low_mean(only["samples"]))


def test_rounds_of_other_sizes_lengths_and_kinds():
    """A video continues one of another length, from a picture of another size; a batch takes one round for all."""
    video = latent(1, 1, 4, 3, 8, 6)
    first, piece = latent(2, 1, 4, 12, 10), latent(3, 1, 4, 5, 8, 6)
    result = run(video, first, piece)["samples"]
    assert result.shape == video["samples"].shape
    torch.testing.assert_close(
        low_mean(result), (low_mean(first["samples"]) + low_mean(piece["samples"])) / 2, rtol=1e-4, atol=1e-4
    )
    batch = latent(1, 3, 4, 8, 8)
    together = run(batch, latent(2), latent(5, 3, 4, 8, 8))["samples"]
    for i in range(3):
        alone = run({"samples": batch["samples"][i : i + 1]}, latent(2),
                    {"samples": latent(5, 3, 4, 8, 8)["samples"][i : i + 1]})["samples"]
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 3, 8, 8)], ids=["pictures", "video"])
def test_masks_choose_where(shape):
    new, first = latent(1, *shape), latent(2, *shape)
    ones = torch.ones(1, 64, 64)
    assert torch.equal(run(new, first, mask=ones)["samples"], run(new, first)["samples"])
    assert torch.equal(run(new, first, mask=0 * ones)["samples"], new["samples"])
    left = ones.clone()
    left[..., 32:] = 0
    result = run(new, first, mask=left, cutoff=0.75)["samples"]
    assert torch.equal(result[..., 4:], new["samples"][..., 4:])
    torch.testing.assert_close(
        low_mean(result[..., :4]), low_mean(first["samples"][..., :4]), rtol=1e-4, atol=1e-4
    )
    each = torch.cat([ones, 0 * ones])  # one for each of the batch
    result = run(new, first, mask=each)["samples"]
    assert torch.equal(result[1], new["samples"][1]) and not torch.equal(result[0], new["samples"][0])
    # A small mask does not vanish in a coarse latent: it weighs what it covers.
    speck = 0 * ones
    speck[0, 3, 3] = 1
    result = run(new, first, mask=speck)["samples"]
    assert (result != new["samples"]).flatten(2).sum(-1).max() <= (shape[2] if len(shape) == 5 else 1)


def nested():
    return {"samples": comfy.nested_tensor.NestedTensor([latent(1)["samples"], latent(2)["samples"]])}


def broken(value):
    samples = latent(2)["samples"]
    samples[0, 0, 0, 0] = value
    return {"samples": samples}


@pytest.mark.parametrize(("problem", "words"), [
    (broken(float("nan")), ["NaN", "fp32"]),
    (broken(float("inf")), ["NaN or infinite"]),
    ({"samples": torch.zeros(1, 4, 8, 8)}, ["all zero", "Empty Latent Image"]),
    ({"samples": torch.zeros(0, 4, 8, 8)}, ["empty"]),
    ({"samples": torch.ones(1, 8, 64)}, ["not an image or video latent", "VAE Encode"]),
    (nested(), ["not an image or video latent", "VAE Encode", "video and audio in one", "Separate AV Latent"]),
])
def test_errors_name_the_input_and_the_fix(problem, words):
    for arguments, name in (((problem, latent(1)), "latent"), ((latent(1), latent(2), problem), "earlier (round 1)")):
        with pytest.raises(ValueError) as caught:
            run(*arguments)
        text = str(caught.value)
        assert text.startswith(name) and all(word in text for word in words), text


@pytest.mark.parametrize(("arguments", "settings", "words"), [
    ((latent(1), latent(2, 1, 16, 8, 8)), {},
     "earlier (round 0) has 16 channels and the model's latents have 4: make all rounds with the same VAE"),
    ((latent(1), latent(2, 2, 4, 8, 8)), {},
     "earlier (round 0) holds 2 latents and the batch is 1: connect one latent"),
    ((latent(1, 2, 4, 8, 8), latent(2, 3, 4, 8, 8)), {}, "connect one latent, or 2"),
    ((latent(1), []), {}, "earlier holds no latent"),
    ((latent(1), latent(2)), {"mask": torch.ones(3, 8, 8)}, "mask holds 3 masks and the batch is 1"),
    ((latent(1), latent(2)), {"mask": torch.full((1, 8, 8), float("nan"))}, "mask holds NaN"),
    ((latent(1), latent(2)), {"cutoff": 0.8}, "cutoff is 0.8: use 0 to 0.75"),
    ((latent(1), latent(2)), {"momentum": -0.1}, "momentum is -0.1"),
    ((latent(1), latent(2)), {"strength": 1.5}, "strength is 1.5"),
])
def test_errors_in_words(arguments, settings, words):
    with pytest.raises(ValueError) as caught:
        run(*arguments, **settings)
    assert words in str(caught.value)


def test_a_list_of_new_latents_is_refused():
    with pytest.raises(ValueError, match="latent is a list of 2"):
        UnderstudyAlignLatentDrift.execute(
            [latent(1), latent(2)], {"round0": [latent(3)]}, cutoff=[0.3], momentum=[0.5], strength=[1.0]
        )


def test_half_precision_latents_come_back_as_they_were():
    new = {"samples": latent(1)["samples"].half()}
    result = method.align_drift(new["samples"], [latent(2)["samples"]], DriftAlignmentConfig())
    assert result.dtype == torch.float16 and torch.isfinite(result).all()
