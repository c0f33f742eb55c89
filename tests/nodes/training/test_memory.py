"""What a training says that it will need, against the arithmetic written out and the guide's table."""

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from launcher.scripts import ROOT
from pack.nodes.training import memory, parallel
from pack.nodes.training.config import TrainingConfig
from support import every_training, fusion_trainings, fusions
from support.real_configurations import FLUX, build

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """As on a GPU, where ComfyUI's estimate counts no matrix of attention."""
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)


@pytest.fixture
def needs(monkeypatch):
    """What trainings tell, in their order."""
    told = []
    monkeypatch.setattr(memory, "tell_needs", lambda needs, *_args, **_options: told.append(needs))
    return told


class Driver(parallel.Engine):
    processes, accumulation = 2, 3


def patcher(name):
    return comfy.model_patcher.ModelPatcher(build(name), CPU, CPU)


def of(model, batch=1, others=(), trained=0, **settings):
    config = TrainingConfig(steps=1, learning_rate=1e-4, **settings)
    return memory.of_session(model, others, [batch, 4, 128, 128], trained, config)


def test_the_numbers_of_sdxl_in_16_bits_are_those_of_the_arithmetic():
    model, other = patcher("SDXL"), patcher("SD 1.5")
    sampling = 128 * 128 * 2 * 0.01 * 0.8 * MIB  # cells, bytes, ComfyUI's share and its factor for SDXL
    weights = 2_567_463_684 * 2
    plain = of(model, batch=12, trained=16 * 1000)
    assert plain.weights == pytest.approx(weights, rel=1e-4)
    assert plain.activations == pytest.approx(12 * 20 * sampling) and plain.trained == 16_000
    assert plain.beside_weights == plain.activations + plain.trained
    assert of(model, gradient_checkpointing=True).activations == pytest.approx(3 * sampling)
    assert of(model, offload=True, others=[other]).weights == 0
    with_other = of(model, others=[other]).weights - plain.weights
    assert with_other == pytest.approx(859_520_964 * 2, rel=1e-4)
    with parallel.driven_by(Driver()):  # a sixth of 12 samples, and of 13 the largest part
        assert of(model, batch=12).activations == pytest.approx(2 * 20 * sampling)
        assert of(model, batch=13).activations == pytest.approx(3 * 20 * sampling)
    gib = weights / 2**30, 12 * 20 * sampling / 2**30
    assert str(plain) == (
        f"needs about {sum(gib):.2f} GiB by estimate: weights {gib[0]:.2f}, activations {gib[1]:.2f}, "
        "what is trained 0.00"
    )


@pytest.mark.parametrize("name", ["prior", "pair", "generator", "adapter"])
def test_all_that_is_trained_is_counted(name, needs):
    tensors, _ = every_training.trained(name, steps=1)
    count = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
    assert [each.trained for each in needs] == [16 * count]


def test_an_encoder_is_counted_with_its_share_of_pictures(needs):
    """ViT-L/14 at 224 pixels: 257 tokens of 1,024 channels in 24 layers; then a small one, trained."""
    large = {"image_size": 224, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24}
    assert memory.of_encoder(6, large, False) == 6 * 257 * 1024 * 24 * 68
    assert memory.of_encoder(6, large, True) == 6 * 257 * 1024 * (68 + 24 * 4)
    fusion_trainings.combined(train_encoder=True, steps=1)
    fusion_trainings.combined(train_encoder=True, steps=1, offload=True)
    config, (plain, streamed) = fusions.vision().config, needs
    weights = sum(tensor.numel() for tensor in fusions.vision().model.parameters())
    assert plain.trained == 16 * weights and streamed.weights == streamed.trained == 0
    tokens, pictures = (32 // 16) ** 2 + 1, plain.activations / (68 * config["num_hidden_layers"])
    assert pictures % (3 * tokens * config["hidden_size"]) == 0 and plain.activations == streamed.activations


ROWS = {
    "SD 1.5": "SD 1.5", "SDXL": "SDXL", "Flux.1": FLUX, "Qwen-Image": "Qwen-Image-Edit 2511",
    "Wan 1.3B": "Wan 2.1 1.3B", "Wan 14B": "Wan 2.1 14B",
}
LATENTS = {"SD 1.5": (1, 4, 64, 64), "Wan 1.3B": (1, 16, 22, 60, 104), "Wan 14B": (1, 16, 22, 60, 104)}


@pytest.mark.parametrize("name", ROWS)
def test_activations_are_about_those_of_the_guides_table(name):
    """The table counts what autograd keeps of the real models on the meta device."""
    guide = (ROOT / "workflows" / "TRAINING.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in guide if line.startswith(("| prior", "| adapter")) and f" {name}," in line)
    weights, trained, kept, _, checkpointed = (float(cell) for cell in row.split("|")[2:7])
    real = ROWS[name]
    if real is FLUX:
        host = FLUX.host_class({**FLUX.unet_config, "dtype": torch.bfloat16})
        model = comfy.model_patcher.ModelPatcher(host.get_model({}, device=torch.device("meta")), CPU, CPU)
    else:
        model = patcher(real)
    shape = LATENTS.get(name, (1, 4, 128, 128))

    def estimated(**settings):
        config = TrainingConfig(steps=1, learning_rate=1e-4, **settings)
        return memory.of_session(model, (), shape, 0, config).activations / 2**30

    assert 0.4 < estimated() / kept < 2.5
    if checkpointed > 5 and checkpointed - weights - trained > 1:  # the table rounds to 1 GiB
        assert 0.4 < estimated(gradient_checkpointing=True) / (checkpointed - weights - trained) < 2.5
