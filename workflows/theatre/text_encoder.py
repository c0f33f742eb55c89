"""The theatre's text encoder in training: transformers' CLIP, and the captions it reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pack.nodes.puppets import captions, theatre, tokenizer
from pack.nodes.puppets.config import Take
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel


def make_text_encoder(device):
    """transformers' CLIP, whose key names the host's Load Checkpoint reads."""
    config = {k: v for k, v in theatre.TEXT_CONFIG.items() if k != "architectures"}
    special = {f"{k}_token_id": v for k, v in (("bos", theatre.SPECIAL_TOKENS["start"]),
                                               ("pad", theatre.SPECIAL_TOKENS["pad"]))}
    return CLIPTextModel(CLIPTextConfig(**config, **special)).to(device)


def text_prefix(text) -> str:
    """The checkpoint's prefix for transformers' parameter names, which may or may not begin with `text_model.`"""
    inner = "" if next(iter(text.state_dict())).startswith("text_model.") else "text_model."
    return f"cond_stage_model.transformer.{inner}"


def tokens(texts: list[str], device):
    """int64 [B, MAX_TOKENS]."""
    return tokenizer.build()(
        texts, padding="max_length", max_length=tokenizer.MAX_TOKENS, truncation=True, return_tensors="pt"
    )["input_ids"].to(device)


def trained(checkpoint: Path, device) -> CLIPTextModel:
    """The text encoder of a `puppets_sd` checkpoint, frozen."""
    text = make_text_encoder(device)
    prefix, stored = text_prefix(text), load_file(checkpoint)
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.copy_(stored[prefix + name])
    return text.eval().requires_grad_(False)


def training_text(takes: Sequence[Take], rng: np.random.Generator, drop: float) -> str:
    """A caption with clauses left out at random, or nothing with probability `drop`."""
    if rng.random() < drop:
        return ""
    words = (captions.training_caption(*takes, rng) if len(takes) == 1 else _group_text(takes, rng)).split()
    if rng.random() < 0.05:  # free words appear without a meaning, so that an untaught one is harmless
        words.insert(rng.integers(0, len(words) + 1), str(rng.choice(tokenizer.FREE_WORDS)))
    return " ".join(words)


def _group_text(takes: Sequence[Take], rng: np.random.Generator) -> str:
    shirts, action, scene = rng.random() < 0.3, rng.random() < 0.9, rng.random() < 0.9
    return captions.group_caption(takes, shirts, action, scene)
