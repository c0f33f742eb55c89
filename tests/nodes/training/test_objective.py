"""The loss of a prediction against diffusers' and flow's formulas, and which samples share a batch."""

import comfy.conds
import comfy.model_sampling
import diffusers
import diffusers.training_utils
import pytest
import torch
from comfy_extras.nodes_model_advanced import LCM
from pack.nodes.training import objective


class Sampling:
    """ComfyUI's model_sampling of a kind, over SD's sigmas."""

    @staticmethod
    def of(kind):
        class ModelSampling(comfy.model_sampling.ModelSamplingDiscrete, kind):
            pass

        return ModelSampling()


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION"])
def test_the_loss_is_the_error_of_the_prediction_with_diffusers_weights(kind):
    """From the denoised estimate we get what diffusers' training scripts write down in ε or v."""
    sampling = Sampling.of(getattr(comfy.model_sampling, kind))
    clean, noise, output = (torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    level = torch.tensor([30, 400, 980])
    sigma = sampling.sigmas[level]
    noisy = sampling.noise_scaling(sigma, noise, clean)
    denoised = sampling.calculate_denoised(sigma, output, noisy)
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon" if kind == "EPS" else "v_prediction",
    )
    target = noise if kind == "EPS" else scheduler.get_velocity(clean, noise, level)
    snr = diffusers.training_utils.compute_snr(scheduler, level)
    for gamma in (0.0, 5.0):
        expected = (output - target).square().mean((1, 2, 3))
        if gamma:
            weight = snr.clamp(max=gamma)
            expected = expected * (weight / snr if kind == "EPS" else weight / (snr + 1))
        actual = objective.PredictionLoss(sampling, gamma)(denoised, clean, sigma)
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW])
def test_flow_loss_is_the_error_of_the_velocity(kind):
    sampling = Sampling.of(kind)
    clean, noise, output = (torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sigma = torch.tensor([0.2, 0.9])
    denoised = sampling.calculate_denoised(sigma, output, sampling.noise_scaling(sigma, noise, clean))
    actual = objective.PredictionLoss(sampling, 0.0)(denoised, clean, sigma)
    torch.testing.assert_close(actual, (output - (noise - clean)).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="min_snr_gamma"):
        objective.PredictionLoss(sampling, 5.0)


@pytest.mark.parametrize("kind", [comfy.model_sampling.X0, LCM])
def test_models_that_predict_something_else_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} prediction"):
        objective.PredictionLoss(Sampling.of(kind), 0.0)


def test_samples_that_fit_one_call_share_a_bucket():
    """Texts of a UNet are repeated to one length; those of other models, and pictures, have to be of one shape."""
    def sample(condition, *shape, **others):
        return objective.Sample(torch.ones(1, 4, 8, 8), {"text": condition(torch.ones(shape)), **others})

    unet, other = comfy.conds.CONDCrossAttn, comfy.conds.CONDRegular
    samples = [
        sample(unet, 1, 77, 8), sample(unet, 1, 385, 8), sample(unet, 1, 154, 8), sample(unet, 1, 77, 16),
        sample(other, 1, 4, 8), sample(other, 1, 4, 8), sample(other, 1, 6, 8), sample(other, 1, 4, 8, more=None),
    ]
    assert [len(bucket) for bucket in objective.Batches(samples, 1).buckets] == [3, 1, 2, 1, 1]
