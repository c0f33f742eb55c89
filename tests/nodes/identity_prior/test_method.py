"""The formulas alone: the prior's loss, masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.identity_prior import method
from pack.nodes.identity_prior.config import IdentityPriorConfig, MaskConfig
from pack.nodes.inputs import latent_masks
from pack.nodes.training.objective import Batches, Sample


def samples(values, shape=(1, 1, 2, 2)):
    return [Sample(torch.full(shape, float(value)), {"name": value}) for value in values]


class Losses:
    """A loss that is each latent's value; remembers how many came at once, and with which conditions."""

    def __init__(self):
        self.calls = []

    def __call__(self, batch, generator):
        self.calls.append(len(batch))
        return torch.cat([sample.latent for sample in batch]).flatten(1).mean(1)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_the_prior_s_loss_is_the_subject_s_and_the_weighted_class_s_in_one_pass(weight):
    loss = Losses()
    objective = method.PriorObjective(loss, Batches(samples([2, 2, 2]), 2), Batches(samples([10] * 5), 2), weight)
    assert float(objective(0, torch.Generator().manual_seed(0))) == pytest.approx(2 + weight * 10)
    assert loss.calls == [4]


def test_a_class_of_another_size_takes_a_pass_of_its_own_and_small_sets_are_not_weighed_more():
    loss = Losses()
    objective = method.PriorObjective(
        loss, Batches(samples([2]), 4), Batches(samples([10] * 5, (1, 1, 4, 2)), 4), 0.5
    )
    assert float(objective(0, torch.Generator().manual_seed(0))) == pytest.approx(2 + 0.5 * 10)
    assert loss.calls == [1, 4]
    objective.classes = Batches(samples([10] * 5), 4)
    assert float(objective(0, torch.Generator().manual_seed(0))) == pytest.approx(2 + 0.5 * 10)
    other = [Sample(sample.latent, {**sample.conditions, "picture": 1}) for sample in samples([10] * 5)]
    objective.classes = Batches(other, 4)
    assert float(objective(0, torch.Generator().manual_seed(0))) == pytest.approx(2 + 0.5 * 10)
    assert loss.calls == [1, 4, 5, 1, 4]


def test_the_same_seed_draws_the_same_pictures():
    drawn = []
    objective = method.PriorObjective(
        lambda batch, g: drawn.append([sample.latent.tolist() for sample in batch]) or torch.ones(len(batch)),
        Batches(samples(range(5)), 1), Batches(samples(range(10, 19)), 1), 1.0,
    )
    for seed in (1, 1, 2, 3, 4):
        objective(0, torch.Generator().manual_seed(seed))
    assert drawn[0] == drawn[1] and len({str(x) for x in drawn}) > 1


# Masks


def test_the_threshold_cuts_the_range_of_each_map():
    heat = torch.stack([torch.arange(16.0).reshape(1, 4, 4), 100 + 5 * torch.arange(16.0).reshape(1, 4, 4)])
    for threshold, count in ((0.0, 16), (0.5, 8), (1.0, 1)):
        mask = method.subject_mask(heat, (4, 4), MaskConfig(threshold=threshold, smoothing=0.0))
        assert mask.sum((1, 2, 3)).tolist() == [count, count]
    flat = method.subject_mask(torch.ones(1, 1, 4, 4), (4, 4), MaskConfig(threshold=1.0))
    assert flat.all(), "a map that says nothing leaves nothing out"


def cuts(values, threshold):
    """By method the cells of a map [N] that are the subject, by definitions in numpy."""
    # Otsu: of all ways to part the values in two, the one with the least variance within the parts.
    within = {
        cut: sum(len(part) * part.var() for part in (values[values < cut], values[values >= cut]))
        for cut in np.unique(values)[1:]
    }
    above = (values - values.mean()) / values.std()
    return {
        "otsu": values >= min(within, key=within.get),
        "mean_std": (above >= threshold / (1 - threshold)) | (above == above.max()),
        "quantile": np.argsort(np.argsort(values)) / (len(values) - 1) >= threshold,
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["otsu", "mean_std", "quantile"])
def test_other_thresholds_follow_their_definitions(kind, threshold):
    random = torch.Generator().manual_seed(3)
    background, spot = torch.rand(8, 8, generator=random), torch.rand(3, 3, generator=random)
    heat = torch.stack([background, background.square()])[:, None]
    heat[0, 0, 2:5, 3:6] = 1.5 + spot
    config = MaskConfig(threshold=threshold, smoothing=0.0, threshold_method=kind)
    masks = method.subject_mask(heat, (8, 8), config)
    for sample, mask in zip(heat, masks, strict=True):
        expected = cuts(sample.flatten().double().numpy(), threshold)[kind]
        np.testing.assert_array_equal(mask.flatten().numpy(), expected)
    if kind == "otsu":
        assert masks[0].sum() == 9 and masks[0, 0, 2:5, 3:6].all()
    flat = method.subject_mask(torch.ones(1, 1, 4, 4), (4, 4), config)
    assert flat.all(), "a map that says nothing leaves nothing out"


def test_an_unreachable_threshold_keeps_the_strongest_cell():
    heat = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    for kind in ("mean_std", "quantile"):
        mask = method.subject_mask(heat, (6, 6), MaskConfig(threshold=1.0, smoothing=0.0, threshold_method=kind))
        assert mask.flatten().argmax() == heat.flatten().argmax() and mask.sum() == 1
    with pytest.raises(ValueError, match="threshold_method"):
        MaskConfig(threshold_method="median")


def test_a_spot_is_found_where_it_is_and_enlarged_with_the_latent():
    heat = torch.zeros(1, 1, 8, 8)
    heat[..., 2:4, 5:7] = 1
    mask = method.subject_mask(heat, (32, 32), MaskConfig(threshold=0.5, smoothing=0.5))
    rows, columns = mask[0, 0].nonzero().T
    assert 7 <= rows.min() <= 9 and 14 <= rows.max() <= 16 and 19 <= columns.min() <= 21 and columns.max() <= 28


def test_smoothing_is_a_gaussian_that_keeps_the_mean_of_a_constant():
    heat = torch.zeros(1, 1, 21, 21)
    heat[..., 10, 10] = 1
    blurred = latent_masks.blurred(heat, 1.5)[0, 0]
    at = torch.exp(-0.5 * (torch.arange(-4, 5) / 1.5) ** 2)
    torch.testing.assert_close(blurred[6:15, 10] / blurred[10, 10], at)
    assert blurred.sum() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(latent_masks.blurred(torch.ones(2, 3, 4, 5), 2.0), torch.ones(2, 3, 4, 5))


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_growing_is_the_cells_around(cells, height, width, seed):
    mask = (torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)) > 0.8).float()
    grown = method.grown(mask, cells)
    for y in range(height):
        for x in range(width):
            around = mask[..., max(0, y - cells) : y + cells + 1, max(0, x - cells) : x + cells + 1]
            assert grown[0, 0, y, x] == around.max()


def test_layers_are_averaged_at_the_finest_or_the_asked_resolution():
    maps = [torch.full((1, 1, 8, 4), 1.0), torch.full((1, 1, 4, 2), 3.0)]
    assert torch.equal(method.mean_map(maps, 0), torch.full((1, 1, 8, 4), 2.0))
    assert method.mean_map(maps, 6).shape == (1, 1, 6, 3)


def test_union_and_blend():
    a, b = torch.tensor([0.0, 1.0, 0.3]), torch.tensor([0.0, 0.0, 0.7])
    assert torch.equal(method.union(a, b), torch.tensor([0.0, 1.0, 0.7]))
    x, source = torch.randn(2, 3, 4, 4), torch.full((1, 3, 4, 4), torch.inf)
    mask = torch.ones(1, 1, 4, 4)
    assert torch.equal(method.blend(x, source, mask), x), "what is not asked for is not looked at"
    source = torch.randn(1, 3, 4, 4)
    mask[..., 0] = 0
    mask[..., 1] = 0.25
    result = method.blend(x, source, mask)
    assert torch.equal(result[..., 0], source[..., 0].expand(2, -1, -1)) and torch.equal(result[..., 2:], x[..., 2:])
    torch.testing.assert_close(result[..., 1], 0.25 * x[..., 1] + 0.75 * source[..., 1].expand(2, -1, -1))


def test_grids_that_belong_together():
    whole = [8.0, 4.0, 2.0, 0.0]
    for part in (whole, whole[1:], whole[:2], [8.00001, 4.0]):
        assert method.same_grid(part, whole)
    for other in ([8.0, 2.0], [8.0, 4.1, 2.0, 0.0], [9.0, *whole], [4.0, 2.0, 1.0]):
        assert not method.same_grid(other, whole)


def test_settings_that_do_nothing_are_refused():
    assert MaskConfig(layers="4-6, 9").layers == "4-6, 9" and MaskConfig(layers="auto").layers == "auto"
    for text in ("", "6-4", "a", "1,,2"):
        with pytest.raises(ValueError, match="layers is .*'auto', 'all', or numbers"):
            MaskConfig(layers=text)
    for settings_ in ({"augment": "flip"}, {"prior_weight": -1.0}, {"class_count": 0}):
        with pytest.raises(ValueError, match=next(iter(settings_))):
            IdentityPriorConfig(**settings_)
    for settings_ in ({"grow": -1}, {"resolution": -1}, {"smoothing": -0.1}):
        with pytest.raises(ValueError, match="0 or more"):
            MaskConfig(**settings_)
