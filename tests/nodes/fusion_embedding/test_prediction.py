"""A fusion's UNet of another prediction than its model's is noticed: by its file, or at the first step."""

import types

import comfy.model_base
import comfy.samplers
import pytest
import torch
from pack.nodes.fusion_embedding import sampling
from pack.nodes.fusion_embedding.method import WHOLE, FusionError
from support import fusions
from support.fusion_runs import MODEL, applied, denoised


class Estimate:
    """ComfyUI's executor around a UNet that knows the clean latent and predicts noise or v, read as `sampled_as`."""

    def __init__(self, predicts, sampled_as, clean):
        kind = comfy.model_base.ModelType[sampled_as]
        self.model_sampling = comfy.model_base.model_sampling(MODEL.model.model_config, kind)
        self.class_obj = types.SimpleNamespace(model_sampling=self.model_sampling)
        self.predicts, self.clean = predicts, clean

    def __call__(self, x, t, *_args, **_kwargs):
        # In the paper's terms: x / sqrt(1 + sigma²) = a x0 + s e, and v = a e - s x0.
        a, s = 1 / (1 + t**2).sqrt(), t / (1 + t**2).sqrt()
        noise = (x - self.clean) / t
        output = noise if self.predicts == "EPS" else a * noise - s * self.clean
        return self.model_sampling.calculate_denoised(t, output, x)


@pytest.mark.parametrize("sigma", [14.6, 7.0])
@pytest.mark.parametrize("sampled_as", ["EPS", "V_PREDICTION"])
@pytest.mark.parametrize("predicts", ["EPS", "V_PREDICTION"])
def test_a_unet_of_another_prediction_is_noticed_at_the_first_step(predicts, sampled_as, sigma, caplog):
    clean = torch.randn(1, 4, 16, 16, generator=fusions.generator(1))
    executor = Estimate(predicts, sampled_as, clean)
    sigmas = torch.tensor([sigma, 2.0, 0.0])
    x = clean + sigma * torch.randn(clean.shape, generator=fusions.generator(2))
    for level in sigmas[:2]:
        sampling._notice_prediction(executor, x, level[None], transformer_options={"sample_sigmas": sigmas})
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (predicts != sampled_as)
    words = {"EPS": "noise", "V_PREDICTION": "v"}
    assert all(f"predicts {words[predicts]} and" in line and "v-prediction SD 2.1" in line for line in warnings)


def test_a_whole_unet_is_watched_in_a_run_and_a_lora_is_not(monkeypatch):
    seen = []

    def notice(executor, *args, **options):
        seen.append(1)
        return executor(*args, **options)

    monkeypatch.setattr(sampling, "_notice_prediction", notice)
    unet = {f"diffusion_model.{key}": value for key, value in MODEL.model.diffusion_model.state_dict().items()}
    whole = fusions.fusion(MODEL, unet=unet, unet_kind=WHOLE)
    for fusion, watched in ((fusions.fusion(MODEL), False), (whole, True)):
        seen.clear()
        model, positive, _ = applied(fusion=fusion)
        denoised(model, positive)
        assert bool(seen) == watched


def test_a_fusion_of_a_model_that_predicts_otherwise_is_refused():
    fusion = fusions.fusion(MODEL, unet=None, unet_kind="", prediction="v")
    with pytest.raises(FusionError, match="predicts v and the model is sampled as one that predicts noise"):
        applied(fusion=fusion)
    assert applied(fusion=fusions.fusion(MODEL, unet=None, unet_kind="", prediction="noise"))
