"""Masks of the loss: their cells, their weights in the loss, and each Train node with them."""

import pytest
import torch
from pack.nodes.training import loss_masks
from pack.nodes.training.config import TrainingConfig
from pack.nodes.training.objective import WEIGHTS, Denoising, PredictionLoss
from pack.nodes.training.stored import Stored
from support import every_training, tiny_model


class EpsilonSampling(torch.nn.Module):
    """Stands for ComfyUI's kind by its name, as prediction_kind looks it up."""


EpsilonSampling.__name__ = "EPS"


def test_weights_are_the_share_of_each_cell_that_the_mask_covers():
    mask = torch.zeros(1, 16, 16, 1)
    mask[:, :8, :4] = 1  # of the first row of cells one whole and half of the second
    (weight,) = loss_masks.weights([mask], [torch.zeros(1, 4, 2, 4)], 0.0)
    assert weight.shape == (1, 1, 2, 4) and weight[0, 0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    (weight,) = loss_masks.weights([mask], [torch.zeros(1, 4, 2, 2)], 0.2)
    assert torch.allclose(weight[0, 0], torch.tensor([[0.2 + 0.8 * 0.5, 0.2], [0.2, 0.2]]))


def test_a_video_s_masks_follow_its_latent_frames():
    masks = torch.zeros(5, 8, 8)
    masks[1:3] = 1  # two of the four frames of the second latent frame
    weight = loss_masks.cells(masks, (1, 16, 2, 2, 2), 0.0)
    assert weight.shape == (1, 1, 2, 2, 2) and weight[0, 0, :, 0, 0].tolist() == [0, 0.5]
    assert loss_masks.cells(torch.ones(1, 8, 8), (1, 16, 2, 2, 2), 0.0).tolist() == torch.ones(1, 1, 2, 2, 2).tolist()


def test_the_loss_is_the_mean_by_weight():
    loss = PredictionLoss(EpsilonSampling(), 0.0)
    generator = torch.Generator().manual_seed(0)
    denoised, clean = torch.randn(2, 2, 4, 3, 3, generator=generator)
    sigma = torch.tensor([0.5, 2.0])
    weights = torch.rand(2, 1, 3, 3, generator=generator)
    actual = loss(denoised, clean, sigma, weights)
    for b in range(2):
        total = sum(
            float(weights[b, 0, y, x] * (denoised - clean)[b, c, y, x] ** 2)
            for c in range(4) for y in range(3) for x in range(3)
        )
        expected = total / (4 * float(weights[b].sum())) / float(sigma[b]) ** 2
        assert float(actual[b]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss(denoised, clean, sigma, torch.ones(2, 1, 3, 3)), loss(denoised, clean, sigma))


@pytest.mark.parametrize("masks", [
    [torch.ones(2, 8, 8)], [torch.ones(8, 8), torch.ones(1, 8, 8)], [torch.ones(1, 8, 8)],
    Stored(2, lambda i: torch.ones(1, 8, 8), ""),
])
def test_masks_come_as_batches_lists_files_and_one_for_all(masks):
    found = loss_masks.pictures(masks, 2)
    assert len(found) == 2 and all(mask.shape == (1, 8, 8, 1) for mask in found)


def test_what_cannot_be_a_mask_is_refused_in_words():
    with pytest.raises(ValueError, match="masks has 3 masks for 2 pictures"):
        loss_masks.pictures([torch.ones(3, 8, 8)], 2)
    with pytest.raises(ValueError, match="masks has 2 masks for 3 videos"):
        loss_masks.videos([torch.ones(5, 8, 8)] * 2, 3)
    with pytest.raises(ValueError, match="masks holds NaN"):
        loss_masks.pictures([torch.full((1, 8, 8), float("nan"))], 1)
    with pytest.raises(ValueError, match="mask 1 of masks is empty and mask_floor is 0"):
        loss_masks.weights(loss_masks.pictures([torch.zeros(1, 8, 8)], 1), [torch.zeros(1, 4, 2, 2)], 0.0)
    assert loss_masks.pictures(None, 2) is None and loss_masks.weights(None, [], 0.0) is None


def test_the_weights_of_a_batch_reach_the_loss():
    """A generator's pairs carry theirs beside them, and a sample among its conditions."""
    model = tiny_model.picture()

    class Plain:
        device, sigmas = torch.device("cpu"), model.model.model_sampling.sigmas
        asked = []

        def __init__(self):
            self.model = model.model

        def denoise(self, noisy, sigma, conditions):
            self.asked.append(conditions)
            return torch.zeros_like(noisy)

    denoising = Denoising(Plain(), TrainingConfig(steps=1, learning_rate=1e-3))
    clean, noise, level = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.tensor([100])
    clean[..., 0] = 3
    weights = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    given = denoising.loss_at(clean, object(), noise, level, weights)
    among = denoising.loss_at(clean, [{"a": 1, WEIGHTS: weights}], noise, level)
    assert torch.equal(given, among) and Plain.asked[-1] == [{"a": 1}]
    assert float(given / denoising.loss_at(clean, [{}], noise, level)) == pytest.approx(9 / 5)


@pytest.mark.parametrize("name", every_training.TRAININGS)
def test_every_training_learns_inside_its_masks(name):
    """A mask of ones is none. The combiner's: tests/nodes/fusion_embedding/test_pairs.py."""
    ones, half = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    half[..., :4] = 0
    plain, _ = every_training.trained(name)
    assert every_training.same(plain, every_training.trained(name, weights=[ones] * 3)[0])
    assert not every_training.same(plain, every_training.trained(name, weights=[half] * 3)[0])
