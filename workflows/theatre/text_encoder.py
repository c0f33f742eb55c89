"""The theatre's text encoder in training: transformers' CLIP, and the captions it reads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pack.nodes.puppets import captions, theatre, tokenizer
from pack.nodes.puppets.config import Take
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

_FREE_WORD_SHARE = 0.05


def make_text_encoder() -> CLIPTextModel:
    """transformers' CLIP, whose key names ComfyUI's Load Checkpoint reads."""
    config = {k: v for k, v in theatre.TEXT_CONFIG.items() if k != "architectures"}
    special = {"bos_token_id": theatre.SPECIAL_TOKENS["start"], "pad_token_id": theatre.SPECIAL_TOKENS["pad"]}
    text = CLIPTextModel(CLIPTextConfig(**config, **special))
    text.set_attn_implementation("eager")  # on a CPU less than half the time of PyTorch's own, with its backward pass
    return text


def text_prefix(text: CLIPTextModel) -> str:
    """The checkpoint's prefix for transformers' parameter names, which may or may not begin with `text_model.`"""
    inner = "" if next(iter(text.state_dict())).startswith("text_model.") else "text_model."
    return f"cond_stage_model.transformer.{inner}"


def tokens(texts: list[str]) -> torch.Tensor:
    """int64 [B, MAX_TOKENS]."""
    return tokenizer.build()(
        texts, padding="max_length", max_length=tokenizer.MAX_TOKENS, truncation=True, return_tensors="pt"
    )["input_ids"]


def renew(text: CLIPTextModel, words: Mapping[str, str]) -> None:
    """Gives words the embeddings of others.

    Words that end up beside each other early are read as one, and hardly a gradient parts them again; one that is
    read as a word which the denoiser heeds is parted from it soon.
    """
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        for word, other in words.items():
            table[tokens([word])[0, 1]] = table[tokens([other])[0, 1]]


def trained(checkpoint: Path, device) -> CLIPTextModel:
    """The text encoder of a `puppets_sd` checkpoint, frozen."""
    text = make_text_encoder()
    prefix, stored = text_prefix(text), load_file(checkpoint)
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            parameter.copy_(stored[prefix + name])
    return text.to(device).eval().requires_grad_(False)


def training_text(
    take: Take, rng: np.random.Generator, drop: float, drop_clause: float = 0.12, bare: float = 0.0
) -> str:
    """A caption with clauses left out at random, or nothing with probability `drop`.

    `drop_clause` and `bare` are those of `captions.training_caption`.
    """
    if rng.random() < drop:
        return ""
    words = captions.training_caption(take, rng, drop_clause, bare).split()
    if rng.random() < _FREE_WORD_SHARE:  # free words appear without a meaning, so that an untaught one is harmless
        words.insert(rng.integers(0, len(words) + 1), str(rng.choice(tokenizer.FREE_WORDS)))
    return " ".join(words)
