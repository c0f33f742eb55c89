"""Where models whose text and picture are one sequence look for the subject, against one softmax over all of it."""

import logging

import pytest
import torch
from pack.nodes.identity_prior import attention, sampling
from pack.nodes.identity_prior.config import BlendConfig, InversionConfig, MaskConfig
from pack.nodes.identity_prior.inversion import Inversion, invert
from pack.nodes.identity_prior.method import Trajectory
from pack.nodes.reference_weight.nodes import UnderstudyReferenceWeight
from pack.nodes.subject_tokens import SUBJECT_TOKENS
from support import capability_checks, families, family_models

NAMES = ("Flux.1", "Flux.2", "LongCat-Image", "Qwen-Image", "Qwen-Image-Edit 2511")
FAMILIES = {family.name: family for family in families.FAMILIES}
POSITIONS = (1, 3)
TEXT = {"Flux.2": 512}  # ComfyUI fills its prompts up in front
_CASES = {}


def case_of(name):
    if name not in _CASES:
        _CASES[name] = capability_checks.Case(FAMILIES[name], family_models.build(FAMILIES[name]))
    return _CASES[name]


def prompt(case, references=0, **more):
    pictures = [case.picture(seed) for seed in range(references)]
    shown = {"reference_latents": pictures} if references else {}
    ((text, options),) = family_models.conditioning(case.family, 5, **shown)
    return [[text, {**options, SUBJECT_TOKENS: POSITIONS, **more}]]


def blended(case, positive, model=None):
    """A blend that changes everything, so that its calls are those of plain sampling."""
    grid = [float(sigma) for sigma in case.sigmas]
    path = Trajectory(grid, torch.zeros(len(grid), *case.family.shape))
    inversion = Inversion(path, torch.ones(1, 1, 1, 1), "ddim")
    masks = MaskConfig(threshold=0.0, grow=0)
    return sampling.apply(model or case.model, inversion, positive, masks, BlendConfig(), None)


def heats_of(monkeypatch, case, patched, positive):
    heats, original = [], attention.AttentionRecorder.heat

    def heat(recorder, *earlier):
        heats.append(original(recorder, *earlier))
        return heats[-1]

    monkeypatch.setattr(attention.AttentionRecorder, "heat", heat)
    samples = case.sample(patched, positive=positive)
    monkeypatch.setattr(attention.AttentionRecorder, "heat", original)
    return heats, samples


def shares_by_hand(case, positive, model=None):
    """Of the first call: the picture's rows, [1, N], in the middle third of the blocks, and how many those are."""
    patched, maps = (model or case.model).clone(), []
    network = case.model.model.diffusion_model
    doubles = len(getattr(network, "double_blocks", ()))
    blocks = doubles + len(getattr(network, "single_blocks", getattr(network, "transformer_blocks", ())))
    text = TEXT.get(case.family.name, families.TOKENS)
    picture = case.family.latent[-2] // network.patch_size * (case.family.latent[-1] // network.patch_size)

    def look(function, q, k, v, heads, mask=None, **kwargs):
        options = kwargs["transformer_options"]
        number = options["block_index"] + doubles * (options["block_type"] == "single")
        if blocks // 3 <= number < blocks - blocks // 3 and 0 in options["cond_or_uncond"]:
            scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
            scores += 0 if mask is None else mask.double().unsqueeze(1)
            row = options["cond_or_uncond"].index(0)
            columns = [text - families.TOKENS + position for position in POSITIONS]
            maps.append(scores.softmax(-1)[row : row + 1, :, text : text + picture, columns].sum(-1).mean(1))
        return function(q, k, v, heads, mask=mask, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = look
    case.sample(patched, positive=positive)
    count = blocks - 2 * (blocks // 3)
    return torch.stack(maps[:count]).mean(0), count


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_the_subject_s_share_of_what_the_picture_s_rows_see(name, references, monkeypatch):
    case = case_of(name)
    positive = prompt(case, references)
    heats, samples = heats_of(monkeypatch, case, blended(case, positive), positive)
    expected, count = shares_by_hand(case, positive)
    assert count >= 1 and len(heats) == capability_checks.STEPS
    torch.testing.assert_close(heats[0].flatten(1).double(), expected, rtol=1e-3, atol=1e-6)
    assert expected.std() > 0 and capability_checks.same(samples, case.sample(positive=positive))


def test_masked_words_take_no_share(monkeypatch):
    case = case_of("Qwen-Image")
    mask = torch.ones(1, families.TOKENS, dtype=torch.long)
    mask[:, 4:] = 0
    positive, whole = prompt(case, attention_mask=mask), prompt(case)
    heats, _ = heats_of(monkeypatch, case, blended(case, positive), positive)
    expected, _ = shares_by_hand(case, positive)
    torch.testing.assert_close(heats[0].flatten(1).double(), expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(expected, shares_by_hand(case, whole)[0], rtol=1e-2)


def test_reference_weight_comes_before_the_blend(monkeypatch):
    case = case_of("Flux.1")
    positive = prompt(case, 1)

    def weighed(model):
        return UnderstudyReferenceWeight.execute(model, 0, 3.0, 0.0, 1.0, "all").result[0]

    heats, samples = heats_of(monkeypatch, case, blended(case, positive, weighed(case.model)), positive)
    assert len(heats) == capability_checks.STEPS
    assert capability_checks.same(samples, case.sample(weighed(case.model), positive=positive))
    with pytest.raises(RuntimeError, match="put Reference Weight before Identity Mask Blend"):
        case.sample(weighed(blended(case, positive)), positive=positive)


def test_a_text_without_the_subject_s_place_asks_for_a_mask(caplog):
    case = case_of("Flux.1")
    untagged = family_models.conditioning(case.family, 5)
    with torch.inference_mode():
        inverted = invert(
            case.model, untagged, {"samples": case.picture(7)}, case.sigmas, InversionConfig("ddim", 1), MaskConfig()
        )
    assert inverted.source_mask.all() and "does not say where the subject is named" in caplog.text
    assert [record.levelno for record in caplog.records if "whole picture" in record.message] == [logging.WARNING]
    with pytest.raises(ValueError, match="connect Encode Identity to `positive`"):
        blended(case, untagged)


def test_blocks_that_steps_of_other_lengths_reach_are_refused():
    recorder = attention.AttentionRecorder(
        {"a": (POSITIONS, 4)}, attention.layers_of(case_of("Flux.1").model), MaskConfig(layers="all"),
        torch.Size((1, 16, 8, 8)),
    )
    q = torch.zeros(1, 16, 32)
    with pytest.raises(ValueError, match="looks at 3 tokens and the prompt has 4"):
        recorder.record(0, q, torch.zeros(1, 19, 32), 2, {"uuids": ["a"]}, text=3)
    with pytest.raises(ValueError, match="has 15 positions where the latent has"):
        recorder.record(0, q[:, :15], torch.zeros(1, 19, 32), 2, {"uuids": ["a"]}, text=4)
