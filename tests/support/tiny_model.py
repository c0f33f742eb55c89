"""Real models of ComfyUI with tiny random weights, and one way to sample them, for tests on the CPU."""

from __future__ import annotations

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from support import inference_weights

CPU = torch.device("cpu")
CONTEXT = 16


def picture(
    flow: bool = False, dtype=torch.float32, seed: int = 0, compute=None, operations=None, in_channels: int = 4,
    channels: int = 32,
) -> comfy.model_patcher.ModelPatcher:
    """An SD 1.5 UNet of one level that predicts noise, or velocity with `flow`; latents [B, 4, H, W].

    Stored in `dtype`, computed in `compute` if that differs, with layers of ComfyUI's `operations`. At 32
    channels its norms, of 32 groups, take away what a time embedding adds; at 64 they leave a part.
    """
    config = comfy.supported_models.SD15(
        {
            **comfy.supported_models.SD15.unet_config,
            "context_dim": CONTEXT,
            "model_channels": channels,
            "image_size": 32,
            "in_channels": in_channels,
            "out_channels": 4,
            "num_res_blocks": [1],
            "channel_mult": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 1],
            "transformer_depth_middle": 1,
            "num_heads": 2,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "dtype": dtype,
        }
    )
    kind = comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    config.custom_operations = operations
    config.set_inference_dtype(dtype, compute)
    return _patcher(lambda: comfy.model_base.BaseModel(config, model_type=kind, device=CPU), dtype, seed)


def xl(seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """An SDXL UNet of two levels: 8 cross-attention layers in 4 places, for prompts of 16 + 24 channels."""
    config = comfy.supported_models.SDXL(
        {
            **comfy.supported_models.SDXL.unet_config,
            "context_dim": 40,
            "model_channels": 32,
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 2],
            "transformer_depth_output": [0, 0, 2, 2],
            "transformer_depth_middle": 2,
            "num_classes": "sequential",
            "adm_in_channels": 24 + 6 * 256,  # the second encoder's pooled prompt and the six sizes
            "num_heads": 2,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "dtype": torch.float32,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    return _patcher(lambda: comfy.model_base.SDXL(config, device=CPU), torch.float32, seed)


def video(seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A Wan 2.1 transformer of one block; latents [B, 16, T, H, W] with even H and W."""
    config = comfy.supported_models.WAN21_T2V(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "ffn_dim": 64,
            "num_heads": 1,
            "num_layers": 1,
            "in_dim": 16,
            "out_dim": 16,
            "freq_dim": 32,
            "text_dim": CONTEXT,
            "text_len": 8,
            "patch_size": (1, 2, 2),
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "dtype": torch.float32,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    return _patcher(lambda: config.get_model({}, device=CPU), torch.float32, seed)


_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 3,
    "in_dim": 16, "out_dim": 16, "freq_dim": 32, "text_dim": CONTEXT, "text_len": 8, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}
_WAN_KINDS = {
    "t2v": ("WAN21_T2V", {}),
    "i2v": ("WAN21_I2V", {"model_type": "i2v", "in_dim": 36}),
    "fun": ("WAN21_T2V", {"in_dim_ref_conv": 16}),
    "camera": ("WAN21_Camera", {"model_type": "camera", "in_dim": 32}),
    "vace": ("WAN21_Vace", {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    "wan2.2 5B": ("WAN22_T2V", {"in_dim": 48, "out_dim": 48}),
    "causal": ("WAN21_CausalAR_T2V", {}),
    "humo": ("WAN21_HuMo", {"model_type": "humo", "audio_token_num": 16}),
    "animate": ("WAN22_Animate", {"model_type": "animate", "in_dim": 36, "num_layers": 5}),
    "scail": ("WAN21_SCAIL", {"model_type": "scail", "in_dim": 20}),
    "scail 2": ("WAN21_SCAIL2", {"model_type": "scail2", "in_dim": 20}),
    "s2v": ("WAN22_S2V", {"model_type": "s2v", "audio_inject_layers": [0]}),
    "wandancer": ("WAN22_WanDancer", {"model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0]}),
}


def wan(
    kind: str = "t2v", seed: int = 0, dtype=torch.float32, compute=None, operations=None, **config
) -> comfy.model_patcher.ModelPatcher:
    """A Wan transformer of three blocks, its attention far from uniform; latents [B, 16 or 48, T, H, W]."""
    name, overrides = _WAN_KINDS[kind]
    config = getattr(comfy.supported_models, name)({**_WAN, **overrides, "dtype": dtype, **config})
    config.custom_operations = operations
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, device=CPU).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("modulation"):
            value = 0.5 * value
        elif parameter.ndim == 1:
            value = 0.1 * value + ("norm" in name and name.endswith("weight")) * 2.0
        else:
            value = value / parameter[0].numel() ** 0.5
        parameter.data = value.to(parameter.dtype)
        parameter.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def video_adapter(model: comfy.model_patcher.ModelPatcher, rank: int = 4, seed: int = 0, scale: float = 0.5) -> dict:
    """Random weights of a video identity adapter for this Wan model, by their published names."""
    network = model.model.diffusion_model
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(len(network.blocks)):
        for name in "qkv":
            stem = f"blocks.{i}.self_attn.{name}_loras"
            down = torch.randn(rank, network.dim, generator=generator)
            tensors[f"{stem}.down.weight"] = down / network.dim**0.5
            tensors[f"{stem}.up.weight"] = scale * torch.randn(network.dim, rank, generator=generator)
    return tensors


def as_loaded(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """`model` as ComfyUI's loaders leave it: its weights are inference tensors."""
    inference_weights.freeze(model.model)
    assert all(parameter.is_inference() for parameter in model.model.parameters())
    return model


def conditioning(seed: int, tokens: int = 4) -> list:
    """A CONDITIONING with one entry of random tokens, [1, tokens, CONTEXT]."""
    return [[torch.randn(1, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed)), {}]]


def sample(
    patcher,
    sampler,
    *,
    shape=(1, 4, 8, 8),
    steps=4,
    scheduler="normal",
    sigmas=None,
    seed=3,
    cfg=2.0,
    positive=None,
    negative=None,
    latent=None,
    denoise_mask=None,
    callback=None,
) -> torch.Tensor:
    """What SamplerCustom does with this SAMPLER: the samples after `process_latent_out`, fp32."""
    if sigmas is None:
        model_sampling = patcher.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(
        conditioning(1) if positive is None else positive, conditioning(2) if negative is None else negative
    )
    guider.set_cfg(cfg)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    latent = torch.zeros(shape) if latent is None else latent
    torch.manual_seed(seed)  # for samplers that draw noise without their own seed
    with torch.inference_mode():
        return guider.sample(noise, latent, sampler, sigmas, denoise_mask, callback, True, seed)


def _patcher(build, dtype, seed) -> comfy.model_patcher.ModelPatcher:
    model = build().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.05).to(dtype)
        parameter.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
