"""A prior's data and settings as other programs read them: a LoRA trained there loads like any other.

Keys and values are those of musubi-tuner's dataset configuration and of ai-toolkit's job files, which may be JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .folder import toml

NONE, MUSUBI, AI_TOOLKIT = "none", "musubi-tuner", "ai-toolkit"
TRAINERS = (NONE, MUSUBI, AI_TOOLKIT)


def musubi(images: Path, classes: Path | None, pictures: Sequence[torch.Tensor]) -> str:
    """musubi-tuner's data sets, as TOML: it has no weight for a class, whose pictures are a second one."""
    height, width = pictures[0].shape[1:3]
    general = {
        "resolution": [width, height], "caption_extension": ".txt", "batch_size": 1, "enable_bucket": True,
        "bucket_no_upscale": True,
    }
    text = toml({"general": general})
    for folder in (images, classes):
        if folder is not None:
            cache = folder.with_name(f"{folder.name}_cache")
            data = {"image_directory": str(folder), "cache_directory": str(cache), "num_repeats": 1}
            text += f"\n[[datasets]]\n{toml(data)}"
    return text


def ai_toolkit(
    name: str, images: Path, classes: Path | None, pictures: Sequence[torch.Tensor], settings: dict[str, Any],
    flow: bool, masks: Path | None = None,
) -> str:
    """ai-toolkit's job as JSON, without the model's path. `flow` is whether the model predicts velocity.

    `masks` is a folder with a file of the same name for each of `images`.
    """
    side = max(max(picture.shape[1:3]) for picture in pictures)
    datasets = [
        {"folder_path": str(folder), "caption_ext": "txt", "resolution": [side], "shuffle_tokens": False,
         "caption_dropout_rate": 0.0, "cache_latents_to_disk": True, "is_reg": folder is classes}
        for folder in (images, classes) if folder is not None
    ]
    if masks is not None:
        datasets[0] |= {"mask_path": str(masks), "mask_min_value": settings.get("mask_floor", 0.0)}
    rank, steps = settings["rank"], settings["steps"]
    process = {
        "type": "sd_trainer", "training_folder": "output", "device": "cuda:0",
        "network": {"type": "lora", "linear": rank, "linear_alpha": rank},
        "save": {"dtype": "float16", "save_every": max(1, steps // 4), "max_step_saves_to_keep": 4},
        "datasets": datasets,
        "train": {
            "batch_size": settings["batch_size"], "steps": steps, "lr": settings["learning_rate"],
            "optimizer": "adamw", "dtype": "bf16", "noise_scheduler": "flowmatch" if flow else "ddpm",
            "train_unet": True, "train_text_encoder": False, "gradient_checkpointing": True,
            "gradient_accumulation_steps": 1, "reg_weight": settings["prior_weight"], "disable_sampling": True,
        },
        "model": {"name_or_path": "PATH OF THE MODEL"},
    }
    config = {"name": name, "process": [process]}
    meta = {"name": name, "version": "1.0"}
    return json.dumps({"job": "extension", "config": config, "meta": meta}, ensure_ascii=False, indent=2)
