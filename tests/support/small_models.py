"""Small files of ComfyUI's own classes with random weights, under the file names of the templates for real models.

`write` makes them. `install` lets ComfyUI's own loaders read them: a file's metadata says its class and its sizes,
as ComfyUI itself reads them for Wan and LTX; everything else of loading and sampling is ComfyUI's. A server installs
it with a pack of one file (`PACK`). The picture autoencoders are ComfyUI's small ones (TAESD).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.wan
import comfy.text_encoders.z_image
import safetensors
import safetensors.torch
import sentencepiece
import torch
from support import families, family_models, tiny_clip, tiny_model

PACK = "import sys\nsys.path.append({folder!r})\nfrom support import small_models\nsmall_models.install()\n" \
    "NODE_CLASS_MAPPINGS = {{}}\n"
_METADATA = "small_model"  # of a file: {"class": ComfyUI's, "unet": sizes, "text": sizes by encoder, "encoder": kind}
_FAMILIES = {family.name: family for family in families.FAMILIES}
_WAN, _QWEN, _Z = (_FAMILIES[name] for name in ("Wan 2.1, 2.2 14B", "Qwen-Image-Edit 2511", "Z-Image"))
_WAN_I2V = dataclasses.replace(_WAN, config={**_WAN.config, "in_dim": 36})  # as Wan 2.2's: without CLIP Vision
_ONE_LAYER = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
# {kind: (ComfyUI's type, tokenizer, model, name of the encoder, sizes)}
_TEXT_ENCODERS = {
    "T5_XXL": (
        comfy.text_encoders.wan.WanT5Tokenizer, comfy.text_encoders.wan.WanT5Model, "umt5xxl",
        {"d_model": _WAN.text, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "vocab_size": 64},
    ),
    "QWEN25_7B": (
        comfy.text_encoders.qwen_image.QwenImageTokenizer, comfy.text_encoders.qwen_image.QwenImageTEModel,
        "qwen25_7b", {"hidden_size": _QWEN.text, **_ONE_LAYER},
    ),
    "QWEN3_4B": (
        comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.ZImageTEModel, "qwen3_4b",
        {"hidden_size": _Z.text, **_ONE_LAYER},
    ),
}


class _SmallVision(comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer):
    """Qwen2.5-VL's vision tower, whose sizes ComfyUI does not take from anywhere."""

    def __init__(self, hidden_size, **options):
        super().__init__(hidden_size=32, intermediate_size=32, num_heads=2, num_layers=1, **options)


def install() -> None:
    """Let this ComfyUI's loaders read the small files; other files load as ever.

    Pictures that Qwen-Image-Edit is shown are scaled to 64 × 64 instead of a megapixel.
    """
    import nodes  # ComfyUI's, which only a server needs

    shows = nodes.NODE_CLASS_MAPPINGS["TextEncodeQwenImageEditPlus"].execute.__func__.__globals__
    shows["math"] = SimpleNamespace(sqrt=lambda ratio: math.sqrt(ratio) / 16)
    model_config, load_clip = comfy.model_detection.model_config_from_unet, comfy.sd.load_clip
    detect_encoder = comfy.sd.detect_te_model

    def small_config(state_dict, prefix, *arguments, metadata=None, **options):
        small = json.loads((metadata or {}).get(_METADATA, "{}"))
        if "unet" not in small:
            return model_config(state_dict, prefix, *arguments, metadata=metadata, **options)
        config = _config(small["class"], small["unet"])
        find_target = config.clip_target

        def clip_target(**found):
            target = find_target(**found)
            target.clip = functools.partial(_sized, target.clip, small["text"])
            return target

        config.clip_target = clip_target
        return config

    def small_clip(ckpt_paths, *arguments, model_options={}, **options):
        with safetensors.safe_open(ckpt_paths[0], "pt") as file:
            small = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        return load_clip(ckpt_paths, *arguments, model_options={**model_options, **small.get("text", {})}, **options)

    def small_encoder(tensors):
        kinds = (kind for kind in _TEXT_ENCODERS if _marker(kind) in tensors)
        kind = next(kinds, None)
        return comfy.sd.TEModel[kind] if kind else detect_encoder(tensors)

    comfy.model_detection.model_config_from_unet = small_config
    comfy.sd.load_clip, comfy.sd.detect_te_model = small_clip, small_encoder
    comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = _SmallVision


def write(folder: Path, models: list[Mapping[str, str]]) -> None:
    """Write each of these model files, `{"name", "directory"}`, into a models folder. KeyError for an unknown one."""
    for model in models:
        path = folder / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            FILES[model["name"]](path)


def _marker(kind: str) -> str:
    return f"small_text_encoder.{kind}"


def _config(host_class: str, sizes: Mapping[str, Any]):
    kind = getattr(comfy.supported_models, host_class)
    config = kind({**kind.unet_config, **sizes})
    config.unet_config.update(sizes)  # again, since a class may set sizes of its own
    return config


def _sized(clip, sizes, **options):
    """ComfyUI's text encoder class, called with sizes beside the loader's options."""
    return clip(**{**options, "model_options": {**options["model_options"], **sizes}})


def _diffusion_model(family: families.Family, path: Path) -> None:
    model = family_models.build(family)
    metadata = {_METADATA: json.dumps({"class": family.host_class, "unet": family.config, "text": {}})}
    safetensors.torch.save_file(model.model.diffusion_model.state_dict(), path, metadata=metadata)


def _checkpoint(family: families.Family, encoder: str, path: Path) -> None:
    """A UNet, its text encoders and an autoencoder in one file, saved by ComfyUI."""
    context = sum(tiny_clip.WIDTHS[encoder].values())
    family = dataclasses.replace(family, config={**family.config, "context_dim": context})
    clip = tiny_clip.clip(encoder)
    vae = comfy.sd.VAE(sd=_taesd(4))
    sizes = {
        f"clip_{name}_model_config": {
            "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3, "hidden_size": width
        }
        for name, width in tiny_clip.WIDTHS[encoder].items()
    }
    metadata = {_METADATA: json.dumps({"class": family.host_class, "unet": family.config, "text": sizes})}
    comfy.sd.save_checkpoint(str(path), family_models.build(family), clip, vae, metadata=metadata)


def _text_encoder(kind: str, path: Path) -> None:
    tokenizer, model, name, sizes = _TEXT_ENCODERS[kind]
    options = {f"{name}_model_config": sizes}
    data = {"spiece_model": _sentences()} if kind == "T5_XXL" else {}
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    with mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", _SmallVision):
        clip = comfy.sd.CLIP(target, tokenizer_data=data, model_options=options)
    tensors = _filled(getattr(clip.cond_stage_model, name).transformer)
    safetensors.torch.save_file(
        {**tensors, **data, _marker(kind): torch.zeros(1)}, path,
        metadata={_METADATA: json.dumps({"text": options})},
    )


def _sentences() -> torch.Tensor:
    """A SentencePiece model of single letters, as bytes: Wan's text encoder files hold theirs like this."""
    model = io.BytesIO()
    letters = "abcdefghijklmnopqrstuvwxyz ,.:"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters, letters[::-1]] * 10), model_writer=model, model_type="char", vocab_size=33,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def _filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's weights, drawn at a size that keeps what passes through it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in module.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim < 2:
            value = 0.1 * value + ("norm" in name or "gamma" in name)
        elif "embed" not in name and "shared" not in name:
            value = value / max(1, tensor[0].numel()) ** 0.5
        tensors[name] = value
    return tensors


def _wan_vae(path: Path) -> None:
    vae = comfy.ldm.wan.vae.WanVAE(
        dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )
    safetensors.torch.save_file(_filled(vae), path)


def _taesd(channels: int) -> dict[str, torch.Tensor]:
    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    return {**_filled(vae), "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


def _adapter(path: Path) -> None:
    tensors = tiny_model.video_adapter(family_models.build(_WAN))
    if path.suffix == ".ckpt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)


_SD15, _SD21, _SDXL = (
    functools.partial(_checkpoint, _FAMILIES[name], encoder)
    for name, encoder in (("SD 1.5", "SD 1.5"), ("SD 2.1", "SD 2.1"), ("SDXL", "SDXL"))
)
_WAN_FILE, _I2V_FILE = (functools.partial(_diffusion_model, family) for family in (_WAN, _WAN_I2V))
FILES: dict[str, Callable[[Path], None]] = {
    "v1-5-pruned-emaonly-fp16.safetensors": _SD15,
    "v2-1_512-ema-pruned.safetensors": _SD21,
    "sd_xl_base_1.0.safetensors": _SDXL,
    "wan2.1_t2v_14B_fp8_scaled.safetensors": _WAN_FILE,
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": _WAN_FILE,
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": _WAN_FILE,
    "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": _I2V_FILE,
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": _I2V_FILE,
    "qwen_image_edit_2511_fp8mixed.safetensors": functools.partial(_diffusion_model, _QWEN),
    "z_image_bf16.safetensors": functools.partial(_diffusion_model, _Z),
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": functools.partial(_text_encoder, "T5_XXL"),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": functools.partial(_text_encoder, "QWEN25_7B"),
    "qwen_3_4b.safetensors": functools.partial(_text_encoder, "QWEN3_4B"),
    "wan_2.1_vae.safetensors": _wan_vae,
    "qwen_image_vae.safetensors": _wan_vae,
    "ae.safetensors": lambda path: safetensors.torch.save_file(_taesd(16), path),
    "Stand-In_wan2.1_T2V_14B_ver1.0_fp16.safetensors": _adapter,
    "Stand-In_wan2.2_T2V_A14B_high.ckpt": _adapter,
    "Stand-In_wan2.2_T2V_A14B_low.ckpt": _adapter,
}
