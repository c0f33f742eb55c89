"""Explain Result on an identity edit: the masks of each step are those with which the run blended."""

import pytest
import torch
from pack.nodes import explanations
from pack.nodes.explain import drawing
from pack.nodes.explain.nodes import UnderstudyExplain
from pack.nodes.identity_prior import explaining, method, sampling
from pack.nodes.patching import models
from support.identity_edits import blended, sample


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(explanations, "is_asked", lambda: True)


def history(model):
    (recorded,) = models.attachment(model, sampling.KEY).explained._records.values()
    return recorded


def test_each_step_has_the_masks_that_the_blend_used(asked, monkeypatch):
    used, original = [], sampling.method.blend

    def blend(x, source, mask):
        used.append(mask.clone())
        return original(x, source, mask)

    monkeypatch.setattr(sampling.method, "blend", blend)
    model = blended(threshold=0.6, grow=1)
    samples = sample(model)
    steps = history(model)
    assert len(steps) == 6 and [step.sigma for step in steps] == sorted((s.sigma for s in steps), reverse=True)
    # The estimate's mask is each call's second.
    for step, mask in zip(steps, used[1::2], strict=False):
        assert torch.equal(step.union, (mask > 0).float())
        assert torch.equal(step.union, method.grown(torch.maximum(step.source, step.edited), 1))
    source, edited = sampling.masks_of(model, samples)
    assert torch.equal(steps[-1].source, source) and torch.equal(steps[-1].edited, edited)


def test_nothing_changes_and_nothing_is_remembered_unless_asked(monkeypatch):
    plain = blended()
    samples = sample(plain)
    assert not models.attachment(plain, sampling.KEY).explained._records
    with pytest.raises(ValueError, match="samples are not what"):
        UnderstudyExplain.execute(plain, {"samples": samples})
    monkeypatch.setattr(explanations, "is_asked", lambda: True)
    watched = blended()
    assert torch.equal(sample(watched), samples) and history(watched)


def test_a_sampler_of_two_calls_a_step_counts_each_noise_level_once(asked):
    model = blended()
    sample(model, "heun")
    sigmas = [step.sigma for step in history(model)]
    assert len(sigmas) == len(set(sigmas)) == 6


def mask(*cells):
    """[1, 1, 4, 4] with 1 in these rows."""
    drawn = torch.zeros(1, 1, 4, 4)
    drawn[:, :, list(cells)] = 1
    return drawn


def test_the_words_are_the_figures_of_the_masks():
    steps = [
        explaining.EditStep(3.0, mask(0, 1), mask(3), mask(0, 1, 3)),
        explaining.EditStep(2.0, mask(0, 1), mask(1, 2), mask(0, 1, 2)),
        explaining.EditStep(1.0, mask(0, 1), mask(1, 2), mask(0, 1, 2)),
    ]
    explanation = explaining.of_edit(steps, connected=False)
    text = "\n".join(explanation.lines)
    assert "covers 50%, the edited one 50%, and 75% may change" in text and "overlap by 33%" in text
    assert "as at the end from step 2 of 3 on" in text
    (panel,) = explanation.panels
    assert panel.rows == ["source", "edited", "union"] and panel.columns == ["step 1", "step 2", "step 3"]
    assert torch.equal(panel.cells[1, 0], mask(3)[0, 0]) and torch.equal(panel.cells[2, 2], mask(0, 1, 2)[0, 0])
    with pytest.raises(ValueError, match="start_percent and end_percent of Identity Mask Blend"):
        explaining.of_edit([], connected=False)


def test_the_picture_shows_each_mask_in_its_cell(asked):
    model = blended(threshold=0.6)
    samples = sample(model)
    image, text = UnderstudyExplain.execute(model, {"samples": samples}).result
    pixels = (image[0] * 255).round().int()
    steps = history(model)
    # Below margin, title and two lines of labels; right of margin and label; 64 pixels a map of 8 x 8 cells.
    for row, kind in enumerate(("source", "edited", "union")):
        for column, step in enumerate(steps):
            expected = getattr(step, kind)[0, 0]
            top, left = 12 + 36 + 36 + row * 66, 12 + 150 + column * 66
            shown = pixels[top + 4 : top + 64 : 8, left + 4 : left + 64 : 8, 2]
            assert torch.equal((shown > 200).float(), expected), (kind, column)
    assert "Identity edit" in text and "no further calls of the model" in text


def test_both_methods_are_one_picture():
    steps = [explaining.EditStep(1.0, mask(0), mask(1), mask(0, 1))]
    one = drawing.draw([explaining.of_edit(steps, False)])
    two = drawing.draw([explaining.of_edit(steps, False)] * 2)
    assert two.shape[1] > 1.8 * one.shape[1] - 24 and two.shape[2] == one.shape[2]
