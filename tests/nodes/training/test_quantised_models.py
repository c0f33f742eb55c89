"""LoRA training on models with unusual weights: fp8, ComfyUI's quantised layers, packed tensors of other packs.

The reference is the same model with its weights unpacked to fp32 beforehand.
"""

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import pytest
import torch
from pack.nodes.training import objective, picture_training
from pack.nodes.training.checkpoints import Checkpoints
from pack.nodes.training.config import LoraConfig, TrainingConfig
from pack.nodes.training.lora import LoraLayers
from pack.nodes.training.session import session
from support import tiny_model

SHAPE = (1, 4, 8, 8)
ATTENTION = LoraConfig(rank=2)


def config(**settings):
    return TrainingConfig(**{"steps": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **settings})


def fp8():
    """A model stored in fp8 whose layers cast to fp32, and its weights as they are in fp32."""
    model = tiny_model.picture(dtype=torch.float8_e4m3fn, compute=torch.float32)
    return model, {name: weight.float() for name, weight in model.model.named_parameters()}


def quantised():
    """Attention layers as ComfyUI's quantised fp8 files hold them."""
    plain = tiny_model.picture()
    names = list(LoraLayers(plain.model.diffusion_model, ATTENTION, 0, tiny_model.CPU).layers)
    state, unpacked = {}, {}
    for name, weight in plain.model.diffusion_model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in names and name != layer:
            scale = weight.abs().max() / 448
            packed = (weight / scale).to(torch.float8_e4m3fn)
            state |= {
                name: packed, f"{layer}.weight_scale": scale,
                f"{layer}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
            }
            unpacked[f"diffusion_model.{name}"] = packed.float() * scale
        else:
            state[name] = weight
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled={"float8_e4m3fn"})
    model = tiny_model.picture(operations=operations)
    model.model.diffusion_model.load_state_dict(state, strict=False)
    layer = model.model.diffusion_model.get_submodule(names[0])
    assert isinstance(layer.weight, comfy.quant_ops.QuantizedTensor)
    return model, unpacked


class Packed(torch.Tensor):
    """Integers with a scale, as packs for GGUF files hold weights; not usable before `unpacked`."""

    def unpacked(self):
        return self.as_subclass(torch.Tensor).float() * self.scale


class PackedOperations(comfy.ops.manual_cast):
    """Linear layers that unpack their weight in every forward pass."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward(self, x):
            if not isinstance(self.weight, Packed):
                return super().forward(x)
            return torch.nn.functional.linear(x, self.weight.unpacked().to(x.dtype), self.bias)


def packed():
    model = tiny_model.picture(operations=PackedOperations)
    unpacked = {}
    for name, module in model.model.named_modules():
        if isinstance(module, PackedOperations.Linear):
            scale = module.weight.abs().max() / 127
            weight = (module.weight / scale).round().to(torch.int8).as_subclass(Packed)
            weight.scale = scale
            module._parameters["weight"] = weight
            unpacked[f"{name}.weight"] = weight.unpacked()
    return model, unpacked


def values(model):
    """Every weight in fp32. ComfyUI's quantised ones are new objects each time it loads them."""
    return {
        name: (weight.dequantize() if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight).float().clone()
        for name, weight in model.model.named_parameters()
    }


def gradients(model):
    with session(model, SHAPE, config()) as denoiser:
        adapters = LoraLayers(denoiser.network, ATTENTION, 0, denoiser.device)
        with torch.no_grad():
            for i, module in enumerate(adapters.modules.values()):
                module.up.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
        latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        sample = objective.Sample(latent, denoiser.prepare(tiny_model.conditioning(0), latent))
        with adapters.attached():
            loss = objective.DenoisingObjective(denoiser, [sample], config())(0, torch.Generator().manual_seed(1))
            loss.backward()
        return loss.item(), {name: weight.grad for name, weight in adapters.parameters().items()}


@pytest.mark.parametrize("make", [fp8, quantised, packed])
def test_gradients_are_those_of_the_unpacked_model(make):
    with torch.inference_mode():
        model, unpacked = make()
    before = values(model)
    plain = tiny_model.picture()
    with torch.no_grad():
        for name, weight in plain.model.named_parameters():
            if name in unpacked:
                weight.copy_(unpacked[name])
    expected_loss, expected = gradients(plain)
    loss, actual = gradients(model)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("make", [fp8, quantised, packed])
def test_a_lora_is_trained_and_a_whole_unet_is_refused(make):
    with torch.inference_mode():
        model, _ = make()
        arguments = [torch.randn(SHAPE)], [tiny_model.conditioning(0)], config()
        keep = {"checkpoints": Checkpoints("test", {}), "resume_from": "none"}
        lora, _ = picture_training.train_on_pictures(model, *arguments, ATTENTION, **keep)
        assert any(weight.abs().max() > 0 for key, weight in lora.items() if "lora_up" in key)
        with pytest.raises(ValueError, match="switch whole_unet off"):
            picture_training.train_on_pictures(model, *arguments, None, **keep)


class Streaming(comfy.model_patcher.ModelPatcher):
    """Reports that it streams its weights, which ComfyUI's does only on a GPU."""

    def is_dynamic(self):
        return True


def test_a_model_that_streams_is_trained_as_a_fully_loaded_clone():
    model = tiny_model.as_loaded(tiny_model.picture())
    streaming = Streaming(model.model, tiny_model.CPU, tiny_model.CPU)
    loads = []

    def load(seed, disable_dynamic):
        loads.append(disable_dynamic)
        return tiny_model.as_loaded(tiny_model.picture(seed=seed))

    streaming.cached_patcher_init = (load, (0,))
    assert gradients(streaming)[0] == gradients(model)[0]
    assert loads == [True]
    streaming.cached_patcher_init = None
    with pytest.raises(ValueError, match="--disable-dynamic-vram"):
        gradients(streaming)
