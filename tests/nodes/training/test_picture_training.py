"""Training through ComfyUI's models at tiny sizes: gradients, LoRA files, ComfyUI's state, batches, interruptions."""

import gc

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import diffusers
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from pack.nodes.inputs import model_fit
from pack.nodes.training import drawing, loop, objective, picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.lora import LoraLayers, lora_model
from pack.nodes.training.session import session
from support import tiny_model

SHAPE = (1, 4, 8, 8)


def latents(count=2):
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def config(**settings):
    return TrainingConfig(**{"steps": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **settings})


def trained(model, count=2, checkpoints=None, resume_from="none", lora=LoraConfig(rank=4), **settings):
    checkpoints = checkpoints or Checkpoints("test", {})
    conditionings = [tiny_model.conditioning(i) for i in range(count)]
    with torch.inference_mode():
        return picture_training.train_on_pictures(
            model, latents(count), conditionings, config(**settings), lora,
            checkpoints=checkpoints, resume_from=resume_from,
        )


def inference_model(**options):
    return tiny_model.as_loaded(tiny_model.picture(**options))


@pytest.mark.parametrize(
    "model", [inference_model(), tiny_model.picture(flow=True), tiny_model.picture(dtype=torch.bfloat16)]
)
def test_it_learns_and_leaves_the_model_as_it_was(model):
    before = {name: parameter for name, parameter in model.model.named_parameters()}
    values = {name: parameter.clone() for name, parameter in before.items()}
    lora, loss_map = trained(model, steps=60)
    first, last = (torch.tensor(loss_map["loss"][part]).mean() for part in (slice(0, 20), slice(40, 60)))
    assert last < first
    assert any(weight.abs().max() > 0 for key, weight in lora.items() if "lora_up" in key)
    for name, parameter in model.model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
    assert not any(module._forward_hooks for module in model.model.modules())
    assert comfy.model_management.in_training is False


def test_comfyui_gets_its_state_back_even_after_an_error():
    model = inference_model()
    before = list(model.model.parameters())
    with pytest.raises(loop.TrainingDiverged):
        with session(model, SHAPE, config(gradient_checkpointing=True)) as denoiser:
            assert comfy.model_management.in_training
            with LoraLayers(denoiser.network, LoraConfig(), 0, denoiser.device).attached():
                raise loop.TrainingDiverged
    assert comfy.model_management.in_training is False
    assert all(a is b for a, b in zip(before, model.model.parameters(), strict=True))
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.model.modules())


def gradients(model, **settings):
    samples_of = lambda denoiser: [  # noqa: E731
        objective.Sample(latent, denoiser.prepare(tiny_model.conditioning(i), latent))
        for i, latent in enumerate(latents())
    ]
    with session(model, SHAPE, config(batch_size=2, **settings)) as denoiser:
        adapters = LoraLayers(denoiser.network, LoraConfig(rank=2), 3, denoiser.device)
        with torch.no_grad():
            for name, parameter in adapters.parameters().items():
                if name.endswith("up"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        with adapters.attached():
            loss = objective.DenoisingObjective(denoiser, samples_of(denoiser), config(batch_size=2, **settings))(
                0, torch.Generator().manual_seed(1)
            )
            loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in adapters.parameters().items()}


def test_gradients_equal_those_of_an_ordinary_model_and_survive_checkpointing():
    loss, expected = gradients(tiny_model.picture())
    for model, settings in ((inference_model(), {}), (inference_model(), {"gradient_checkpointing": True})):
        actual_loss, actual = gradients(model, **settings)
        assert actual_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items())


def test_a_batch_costs_one_forward():
    model = inference_model()
    calls = []  # of steps, which have gradients

    def count(_module, inputs, _output):
        if torch.is_grad_enabled():
            calls.append(len(inputs[0]))

    handle = model.model.diffusion_model.register_forward_hook(count)
    trained(model, count=6, batch_size=4, steps=3)
    handle.remove()
    assert calls == [4, 4, 4]


def test_pictures_of_several_sizes_train_in_batches_of_one_size():
    model = inference_model()
    sizes = [(1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 16, 8)]
    seen = set()

    def see(_module, inputs, _output):
        if torch.is_grad_enabled():  # in a step
            seen.add(tuple(inputs[0].shape))

    handle = model.model.diffusion_model.register_forward_hook(see)
    with torch.inference_mode():
        picture_training.train_on_pictures(
            model, [torch.randn(size) for size in sizes], [tiny_model.conditioning(i) for i in range(3)],
            config(batch_size=2, steps=12), LoraConfig(rank=2),
            checkpoints=Checkpoints("test", {}), resume_from="none",
        )
    handle.remove()
    assert seen == {(2, 4, 8, 8), (1, 4, 16, 8)}


def test_the_native_lora_loader_gives_what_was_trained():
    model = inference_model()
    x, sigma = latents(1)[0], torch.tensor([2.0])
    generator = torch.Generator().manual_seed(1)
    with session(model, SHAPE, config()) as denoiser:
        adapters = LoraLayers(denoiser.network, LoraConfig(rank=4, alpha=2.0), 0, denoiser.device)
        for module in adapters.modules.values():
            torch.nn.init.normal_(module.up, 0, 0.2, generator)
        conditions = [denoiser.prepare(tiny_model.conditioning(0), x)]
        with torch.no_grad():
            plain = denoiser.denoise(x, sigma, conditions)
            with adapters.attached():
                expected = denoiser.denoise(x, sigma, conditions)
        lora = lora_model(adapters, denoiser.model.model_config.unet_config)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
        assert len(patched.patches) == len(adapters.modules)
    with session(patched, SHAPE, config()) as denoiser, torch.no_grad():
        actual = denoiser.denoise(x, sigma, conditions)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_diffusers_reads_the_file_through_its_converter():
    """A UNet of the same shape in diffusers takes every matrix of the file, in its layer."""
    lora, _ = trained(inference_model())
    keys = {key.rsplit(".", 2)[0] if "lora_" in key.rsplit(".", 2)[-2] else key[: -len(".alpha")] for key in lora}
    actual, alphas = _convert_non_diffusers_lora_to_diffusers(dict(lora))
    assert len(actual) == 2 * len(keys)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=tiny_model.CONTEXT, attention_head_dim=2,
    )
    unet.load_lora_adapter(actual, prefix="unet", network_alphas=alphas)
    loaded = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * len(keys)
    for key in keys:
        layer = key.removeprefix("lora_unet_")
        twins = [p for name, p in loaded.items() if name.replace(".", "_").startswith(f"{layer}_lora_B")]
        assert len(twins) == 1 and torch.equal(twins[0], lora[f"{key}.lora_up.weight"])


def test_video_models_train_and_load_under_their_names():
    model = tiny_model.video()
    video = torch.randn(1, 16, 3, 4, 4)
    with torch.inference_mode():
        lora, loss_map = picture_training.train_on_pictures(
            model, [video], [tiny_model.conditioning(0)], config(steps=30), LoraConfig(rank=2),
            checkpoints=Checkpoints("test", {}), resume_from="none",
        )
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    assert "diffusion_model.blocks.0.self_attn.q.lora_up.weight" in lora
    assert len(patched.patches) == len(lora) // 3
    assert all(torch.isfinite(torch.tensor(loss_map["loss"])))


def test_a_model_without_named_attention_is_refused():
    with pytest.raises(ValueError, match="model is SD 1.5, none of whose layers"):
        trained(inference_model(), lora=LoraConfig(layers="no such layer"))


class Moving(comfy.model_patcher.ModelPatcher):
    """Moves its weights when it loads, as on a GPU: the tensors then hide that they were made in inference mode."""

    def load(self, *args, **kwargs):
        dtype = self.model.get_dtype_inference()
        self.model.to(torch.float64).to(dtype)
        return super().load(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_comfyui_moved_can_be_trained_through(dtype):
    model = inference_model(dtype=dtype)
    lora, _ = trained(Moving(model.model, tiny_model.CPU, tiny_model.CPU))
    assert any(weight.abs().max() > 0 for key, weight in lora.items() if "lora_up" in key)


def test_an_attention_without_a_gradient_is_not_used():
    model = inference_model()
    used = []

    def without_gradient(function, *args, **kwargs):
        used.append(function)
        return function(*args, **kwargs).detach()

    model.model_options["transformer_options"]["optimized_attention_override"] = without_gradient
    lora, _ = trained(model)
    assert not used
    assert all(weight.abs().max() > 0 for key, weight in lora.items() if "lora_up" in key)


def test_inpainting_models_train_on_an_empty_mask():
    model = tiny_model.as_loaded(tiny_model.picture(in_channels=9))
    model.model.set_inpaint()
    lora, loss_map = trained(model)
    assert all(torch.isfinite(torch.tensor(loss_map["loss"])))


def test_another_models_text_is_told_even_where_the_models_structure_does_not_say(monkeypatch):
    monkeypatch.setattr(model_fit, "text_width", lambda network: None)
    with session(inference_model(), SHAPE, config()) as denoiser:
        conditions = [denoiser.prepare([[torch.ones(1, 8, 24), {}]], torch.zeros(SHAPE))]
        with pytest.raises(ValueError, match="another model's.*24.*connect the CLIP"):
            denoiser.denoise(torch.zeros(SHAPE), torch.ones(1), conditions)


@pytest.mark.parametrize(("name", "words"), [("hooks", "a scheduled LoRA"), ("control", "a ControlNet")])
def test_what_only_sampling_would_apply_is_refused(name, words):
    ((text, options),) = tiny_model.conditioning(0)
    with session(inference_model(), SHAPE, config()) as denoiser:
        with pytest.raises(ValueError, match=f"a caption to train on holds .*{words}.*: connect"):
            denoiser.prepare([[text, {**options, name: object()}]], torch.zeros(SHAPE))


def test_a_preview_is_skipped_without_free_memory(monkeypatch):
    vae = object()
    preview = drawing.preview_of(vae, [], [], SHAPE, 0)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 0)
    with session(inference_model(), SHAPE, config()) as denoiser:
        assert preview(denoiser) is None


def test_a_preview_that_runs_out_of_memory_changes_nothing(monkeypatch, caplog):
    model, conditionings = inference_model(), [tiny_model.conditioning(i) for i in range(3)]
    asked = []

    def full(*_args, **_options):
        asked.append(1)
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    def run(preview=None):
        with torch.inference_mode():
            return picture_training.train_on_pictures(
                model, latents(), conditionings[:2], config(steps=4, preview_every=2), LoraConfig(rank=4),
                checkpoints=Checkpoints("test", {}), resume_from="none", preview=preview,
            )

    plain, losses = run()
    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", full)
    watched, same = run(drawing.preview_of(object(), conditionings[0], conditionings[2], SHAPE, 0))
    assert asked == [1] and losses == same and "out of memory" in caplog.text
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
    assert model.model.current_patcher is None and not comfy.model_management.in_training


def test_a_preview_that_fails_leaves_the_session_s_model_to_the_session(monkeypatch):
    """Sampling ends with a cleanup, after which hooks and dynamic weights would find no patcher at the next step."""
    conditionings = [tiny_model.conditioning(i) for i in range(2)]

    def full(*_args, **_options):
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", full)
    with session(inference_model(), SHAPE, config()) as denoiser:
        with pytest.raises(comfy.model_management.OOM_EXCEPTION):
            drawing.sample_in_training(denoiser, *conditionings, SHAPE, 0, 2)
        assert denoiser.model.current_patcher is denoiser.patcher
    assert denoiser.model.current_patcher is None


def test_comfyui_can_unload_a_model_whose_training_failed():
    model = tiny_model.picture(dtype=torch.bfloat16)
    frames = []
    try:
        with session(model, SHAPE, config(dtype="fp32")) as denoiser:
            frames.append((frames, denoiser))  # a cycle, as an error's frames make one
            raise loop.TrainingDiverged
    except loop.TrainingDiverged:
        pass
    del denoiser, frames
    gc.collect()
    assert not any(loaded.is_dead() for loaded in comfy.model_management.current_loaded_models)


class Cells:
    """An encoder of eight pixels per cell."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, picture):
        return picture[:, ::8, ::8].movedim(-1, 1)


def test_pictures_that_do_not_fit_the_cells_are_warned_of(caplog):
    picture_training.encode_pictures(Cells(), [torch.zeros(1, 64, 48, 3)])
    assert not caplog.records
    picture_training.encode_pictures(Cells(), [torch.zeros(1, 64, 50, 3)])
    assert "pictures of 50 x 64 pixels are cut to multiples of 8" in caplog.text
    for width in (7, 31):
        with pytest.raises(ValueError, match=f"{width} x 200 pixels is too small to train on"):
            picture_training.encode_pictures(Cells(), [torch.zeros(1, 200, width, 3)])
    picture_training.encode_pictures(Cells(), [torch.zeros(1, 200, 32, 3)])
