"""Tiny fusions and pictures with random content, for the tests of the fusion embedding on the CPU."""

from __future__ import annotations

import comfy.clip_vision
import torch
from pack.nodes.fusion_embedding import layout, sampling
from pack.nodes.fusion_embedding.method import LORA, Fusion
from pack.nodes.puppets.vision import VISION_CONFIG
from support import inference_weights, tiny_model

WIDTH = 12  # of embeddings
HIDDEN = 16  # of hidden states
CHANNELS = 64  # of the UNet


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(**options):
    """tiny_model.picture whose answer tokens, embedding and pose change by a good part."""
    return lively(tiny_model.picture(channels=CHANNELS, **options))


def lively(model):
    """The same tiny model with weights as large as trained ones."""
    for i, (name, parameter) in enumerate(model.model.diffusion_model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator(100 + i))
        value = value / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * value
        value += parameter.ndim == 1 and name.endswith("weight")  # of a norm
        parameter.data = value.to(parameter.dtype)
    return model


def vision(seed: int = 0, width: int = WIDTH, hidden: int = HIDDEN, **config):
    """ComfyUI's CLIP_VISION of two layers with random weights, in its own precision."""
    small = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    created = comfy.clip_vision.ClipVisionModel(
        {**VISION_CONFIG, **small, "projection_dim": width, "image_size": 32, "patch_size": 16, **config}
    )
    with torch.inference_mode(False):
        for name, parameter in created.model.named_parameters():
            value = 0.3 * torch.randn(parameter.shape, generator=generator(seed + len(name)))
            value += ("norm" in name or "layrnorm" in name) and name.endswith("weight")
            parameter.data = value.to(parameter.dtype)
            parameter.requires_grad_(False)
    return created


def combiner(seed: int = 0, width: int = WIDTH) -> layout.Weights:
    return layout.new_combiner(width, 7, 5, generator(seed))


def weights(model, embedding: int | None = WIDTH, seed: int = 0, hidden: int = HIDDEN) -> layout.Weights:
    """A generator for `model` whose every path acts."""
    sizes = sampling.model_sizes(model, hidden, embedding)
    created = layout.new_generator(sizes, 9, (4, 6, 8, 10), generator(seed))
    for key in ("embedding.second.weight", "embedding.second.bias", "pose.conv_out.weight", "pose.conv_out.bias"):
        if key in created:
            created[key] = 0.3 * torch.randn(created[key].shape, generator=generator(seed + len(key)))
    return created


def lora(seed: int = 0, rank: int = 2) -> layout.Weights:
    """A LoRA of one layer of the model's UNet."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    return {
        f"{stem}.lora_down.weight": torch.randn(rank, CHANNELS, generator=generator(seed)),
        f"{stem}.lora_up.weight": torch.randn(CHANNELS, rank, generator=generator(seed + 1)),
        f"{stem}.alpha": torch.tensor(float(rank)),
    }


def fusion(model, seed: int = 0, **parts) -> Fusion:
    created = {
        "combiner": combiner(seed), "generator": weights(model, seed=seed), "unet": lora(seed), "unet_kind": LORA
    }
    return Fusion(**{**created, **parts})


def pictures(count: int = 1, height: int = 64, width: int = 64, seed: int = 0, channels: int = 3) -> torch.Tensor:
    """[B, H, W, C] of noise."""
    return torch.rand(count, height, width, channels, generator=generator(seed))


def poses(count: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """[B, H, W, 3], black with a bright limb each."""
    drawn = torch.zeros(count, height, width, 3)
    for i in range(count):
        at = 8 + (7 * (i + seed)) % (width - 16)
        drawn[i, 8 : height - 8, at : at + 4] = torch.tensor([1.0, 0.5, 0.2])
    return drawn


def states(count: int = 1, tokens: int = 5, hidden: int = HIDDEN, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, tokens, hidden, generator=generator(seed))


def fused(count: int = 1, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator(seed)), dim=-1)


def pair_lists(count: int = 4, size: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """source, pose and target, where the target is the source with the pose drawn on it."""
    source, pose = pictures(count, size, size, seed), poses(count, size, size, seed)
    return {"source": source, "pose": pose, "target": (source * 0.5 + pose * 0.5)}


def autoencoder(seed: int = 0):
    """ComfyUI's VAE of the TAESD kind with random weights: 4 latent channels, factor 8."""
    import comfy.sd
    import comfy.taesd.taesd

    weights = {}
    for i, (key, value) in enumerate(comfy.taesd.taesd.TAESD(latent_channels=4).state_dict().items()):
        # ComfyUI leaves weights as memory was; the two numbers without dimensions are constants.
        drawn = 0.05 * torch.randn(value.shape, generator=generator(seed + i))
        weights[key] = value if not value.ndim else drawn if value.ndim > 1 else torch.zeros_like(value)
    return comfy.sd.VAE(sd=weights)


def as_loaded(clip_vision):
    """An encoder as ComfyUI's loaders leave it: its weights are inference tensors."""
    inference_weights.freeze(clip_vision.model)
    return clip_vision
