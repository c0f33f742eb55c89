"""A prior's data and settings as other programs read them: a LoRA trained there loads like any other.

Keys and values are those of musubi-tuner's data set and training configurations and of ai-toolkit's job files, which
may be JSON. Folders are relative to the job's, in which both programs are to be started: they read them from there.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from .folder import toml

NONE, MUSUBI, AI_TOOLKIT = "none", "musubi-tuner", "ai-toolkit"
TRAINERS = (NONE, MUSUBI, AI_TOOLKIT)


# What musubi-tuner's documentation names for each family on still pictures: how its scripts' names begin, the module
# of its LoRA, how to sample noise levels, with their shift, and which model it is. It has none for UNets.
_MUSUBI = {
    "Qwen-Image": ("qwen_image", "networks.lora_qwen_image", "shift", 2.2, {"model_version": "original"}),
    "Z-Image": ("zimage", "networks.lora_zimage", "shift", 2.0, {}),
    "Flux.2": ("flux_2", "networks.lora_flux_2", "flux2_shift", None, {"model_version": "VERSION OF THE MODEL"}),
    "Krea 2": ("krea2", "networks.lora_krea2", "shift", 2.5, {}),
    "Wan 2.1": ("wan", "networks.lora_wan", "shift", 3.0, {"task": "TASK OF THE MODEL, SUCH AS t2v-14B"}),
}
MUSUBI_DATA, MUSUBI_TRAINING = "musubi_dataset.toml", "musubi_training.toml"
# ai-toolkit's word for each family; without one it takes a model for SD 1.5.
_ARCHITECTURES = {
    "SD 1.5": "sd1", "SD 2.1": "sd2", "SDXL": "sdxl", "SD 3.5": "sd3", "Flux.1": "flux", "Chroma": "chroma",
    "Qwen-Image": "qwen_image", "Z-Image": "zimage", "Krea 2": "krea2", "Wan 2.1": "wan21",
}


def musubi_training(family: str, name: str, settings: dict[str, Any]) -> tuple[str, str] | None:
    """musubi-tuner's options for its --config_file, as TOML without the models' paths, and how its scripts' names
    begin. None for a family, as inputs.families names it, that is not in the table above.
    """
    if family not in _MUSUBI:
        return None
    script, module, sampling, shift, which = _MUSUBI[family]
    text_encoder = "t5" if script == "wan" else "text_encoder"
    model = {"dit": "PATH OF THE MODEL", "vae": "PATH OF THE VAE", text_encoder: "PATH OF THE TEXT ENCODER", **which}
    training = {
        "dataset_config": MUSUBI_DATA, "network_module": module,
        "network_dim": settings["rank"], "network_alpha": float(settings["rank"]),
        "max_train_steps": settings["steps"], "learning_rate": settings["learning_rate"],
        "optimizer_type": "AdamW", "lr_scheduler": "constant",
        "seed": settings["seed"] % 2**32, "mixed_precision": "bf16", "sdpa": True, "gradient_checkpointing": True,
        "timestep_sampling": sampling, "discrete_flow_shift": shift, "weighting_scheme": "none",
        "save_every_n_steps": max(1, settings["steps"] // 4), "output_dir": "output", "output_name": name,
    }
    return toml({**model, **training}), script


def musubi(images: str, classes: str | None, pictures: Sequence[torch.Tensor], batch_size: int) -> str:
    """musubi-tuner's data sets, as TOML: it has no weight for a class, whose pictures are a second one."""
    height, width = pictures[0].shape[1:3]
    general = {
        "resolution": [width, height], "caption_extension": ".txt", "batch_size": batch_size, "enable_bucket": True,
        "bucket_no_upscale": True,
    }
    text = toml({"general": general})
    for folder in (images, classes):
        if folder is not None:
            data = {"image_directory": folder, "cache_directory": f"{folder}_cache", "num_repeats": 1}
            text += f"\n[[datasets]]\n{toml(data)}"
    return text


def ai_toolkit(
    name: str, images: str, classes: str | None, pictures: Sequence[torch.Tensor], settings: dict[str, Any],
    family: str, kind: str, masks: str | None = None,
) -> str:
    """ai-toolkit's job as JSON, without the model's path. `kind` is what the model predicts: noise, v or flow.

    `masks` is a folder with a file of the same name for each of `images`. The model's architecture is left to be
    filled in where `family`, as inputs.families names it, is not in the table above.
    """
    side = max(max(picture.shape[1:3]) for picture in pictures)
    datasets = [
        {"folder_path": folder, "caption_ext": "txt", "resolution": [side], "shuffle_tokens": False,
         "caption_dropout_rate": 0.0, "cache_latents_to_disk": True, "is_reg": folder is classes}
        for folder in (images, classes) if folder is not None
    ]
    if masks is not None:
        datasets[0] |= {"mask_path": masks, "mask_min_value": settings.get("mask_floor", 0.0)}
    rank, steps = settings["rank"], settings["steps"]
    process = {
        "type": "sd_trainer", "training_folder": "output", "device": "cuda:0",
        "network": {"type": "lora", "linear": rank, "linear_alpha": rank},
        "save": {"dtype": "float16", "save_every": max(1, steps // 4), "max_step_saves_to_keep": 4},
        "datasets": datasets,
        "train": {
            "batch_size": settings["batch_size"], "steps": steps, "lr": settings["learning_rate"],
            "optimizer": "adamw", "dtype": "bf16", "noise_scheduler": "flowmatch" if "flow" in kind else "ddpm",
            "train_unet": True, "train_text_encoder": False, "gradient_checkpointing": True,
            "gradient_accumulation_steps": 1, "reg_weight": settings["prior_weight"], "disable_sampling": True,
        },
        "model": {
            "name_or_path": "PATH OF THE MODEL", "arch": _ARCHITECTURES.get(family, "ARCHITECTURE OF THE MODEL"),
            "is_v_pred": kind == "v",
        },
    }
    config = {"name": name, "process": [process]}
    meta = {"name": name, "version": "1.0"}
    return json.dumps({"job": "extension", "config": config, "meta": meta}, ensure_ascii=False, indent=2)
