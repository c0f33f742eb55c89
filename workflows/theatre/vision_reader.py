"""The theatre's image encoder as it is trained: to say what is in a picture, from one embedding and from its tokens.

Embeddings of pictures are read out for words, colours and joints, those of a pose drawing for the joints alone; each
patch token for its own pixels and the parts in them. The readouts are not kept.
"""

from collections.abc import Callable, Sequence

import fusion_pairs
import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import clip_preprocess
from pack.nodes.puppets.config import (
    ALL_ACTIONS,
    DETAILS,
    HEADWEAR,
    PART_NAMES,
    PATTERNS,
    SCENES,
    SPECIES,
    Take,
)
from pack.nodes.puppets.vision import VISION_CONFIG
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WORDS = {
    "species": SPECIES, "pattern": PATTERNS, "headwear": HEADWEAR, "detail": DETAILS, "scene": SCENES,
    "action": ALL_ACTIONS,
}
_COLOURS = ("skin", "accent", "shirt", "pattern_colour", "trousers", "headwear_colour", "detail_colour")
_JOINTS, _PATCH, _CELLS = 18, VISION_CONFIG["patch_size"], 4  # of a pose; pixels and cells of a patch's side
_COLOUR_WEIGHT, _JOINT_WEIGHT, _PIXEL_WEIGHT, _PART_WEIGHT = 10.0, 20.0, 2.0, 0.5


class Reader(nn.Module):
    """The encoder with its readouts; a call is the loss of a batch from `drawer`."""

    def __init__(self):
        super().__init__()
        comfys_own = ("model_type", "image_mean", "image_std")
        known = {key: value for key, value in VISION_CONFIG.items() if key not in comfys_own}
        self.encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**known))
        width, self.answers = VISION_CONFIG["hidden_size"], [len(names) for names in WORDS.values()]
        outputs = [*self.answers, 3 * len(_COLOURS), 2 * _JOINTS]
        self.embedding_readout = nn.Linear(VISION_CONFIG["projection_dim"], sum(outputs))
        self.token_readout = nn.Linear(width, 3 * _PATCH**2 + len(PART_NAMES) * _CELLS**2)
        self.outputs = outputs

    def read(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Readouts of the embeddings, a logits tensor a kind of word, colours, joints; and of patch tokens."""
        seen = self.encoder(pixel_values=pixels)
        embeddings = self.embedding_readout(seen.image_embeds).float().split(self.outputs, 1)
        return list(embeddings), self.token_readout(seen.last_hidden_state[:, 1:]).float()

    def forward(self, pixels, words, colours, shown, joints, cells) -> torch.Tensor:
        """The loss of prepared pixels [3B, 3, 64, 64]: sources, targets, then pose drawings of the targets.

        words: int64 [kinds, 2B]. colours: [2B, 7, 3], and `shown` [2B, 7, 1], which of them are to be seen. joints:
        [3B, 18, 3], the last 1 inside the frame. cells: parts, int64 [2B, 64, 16].
        """
        (*said, painted, posed), tokens = self.read(pixels)
        count = words.shape[1]
        named = sum(F.cross_entropy(logits[:count], wanted) for logits, wanted in zip(said, words, strict=True))
        painted = ((painted[:count].unflatten(1, colours.shape[1:]) - colours).abs() * shown).sum() / shown.sum()
        inside = joints[..., 2:]
        apart = ((posed.unflatten(1, (_JOINTS, 2)) - joints[..., :2]).abs() * inside).sum() / inside.sum() / 2
        drawn, parts = tokens.split([3 * _PATCH**2, len(PART_NAMES) * _CELLS**2], dim=2)
        patches = F.unfold(pixels, _PATCH, stride=_PATCH).mT
        parts = parts[:count].unflatten(2, (_CELLS**2, len(PART_NAMES)))
        return (
            named + _COLOUR_WEIGHT * painted + _JOINT_WEIGHT * apart + _PIXEL_WEIGHT * (drawn - patches).abs().mean()
            + _PART_WEIGHT * F.cross_entropy(parts.flatten(0, 2), cells.flatten())
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """The encoder's, under ComfyUI's names."""
        return self.encoder.state_dict()


def prepared(pictures: np.ndarray) -> torch.Tensor:
    """float [B, 3, 64, 64] of uint8 [B, H, W, 3], as ComfyUI prepares them for this encoder."""
    images = torch.from_numpy(np.array(pictures)).float() / 255
    return clip_preprocess(
        images, size=VISION_CONFIG["image_size"], mean=VISION_CONFIG["image_mean"], std=VISION_CONFIG["image_std"],
        crop=False,
    )


def answers(takes: Sequence[Take]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The right words, positions [kinds, B]; colours [B, 7, 3]; and which of those are to be seen, [B, 7, 1]."""
    words = torch.tensor([
        [names.index(getattr(take.identity, kind, None) or getattr(take, kind)) for take in takes]
        for kind, names in WORDS.items()
    ])
    colours = torch.tensor([[getattr(take.identity, name) for name in _COLOURS] for take in takes])
    shown = torch.ones(len(takes), len(_COLOURS), 1)
    for i, take in enumerate(takes):
        who = take.identity
        shown[i, 3] = who.pattern != "plain"
        shown[i, 4] = take.framing == "full"
        shown[i, 5] = who.headwear != "none"
        shown[i, 6] = who.detail not in ("none", "ear")
    return words, colours, shown


def batch(data: dict[str, np.ndarray], chosen: np.ndarray, seed: int) -> tuple[torch.Tensor, ...]:
    """The arguments of `Reader.forward` for some pairs."""
    pairs = [fusion_pairs.takes(int(i), seed, close_ups=True) for i in chosen]
    pictures = np.array(data["pictures"][chosen])
    pixels = prepared(np.concatenate([pictures[:, 0], pictures[:, 2], pictures[:, 1]]))
    joints = torch.from_numpy(np.array(data["joints"][chosen]))
    side = VISION_CONFIG["image_size"] // _PATCH
    cells = torch.from_numpy(np.array(data["parts"][chosen])).long().transpose(0, 1).flatten(0, 1)
    cells = cells.reshape(-1, side, _CELLS, side, _CELLS).transpose(2, 3).reshape(-1, side**2, _CELLS**2)
    right = answers([take for order in zip(*pairs, strict=True) for take in order])
    return pixels, *right, torch.cat([joints[:, 0], joints[:, 1], joints[:, 1]]), cells


def drawer(data: dict[str, np.ndarray], count: int, size: int, seed: int) -> Callable:
    """draw(rng, step) -> `size` of the first `count` pairs."""

    def draw(rng: np.random.Generator, _step: int) -> tuple[torch.Tensor, ...]:
        return batch(data, np.sort(rng.choice(count, size, replace=False)), seed)

    return draw


def inspector(data: dict[str, np.ndarray], kept_back: range, seed: int) -> Callable:
    """inspect(reader) -> (how much it reads right on pairs that were kept back, pictures, misread ones first)."""

    def inspect(reader: Reader) -> tuple[str, np.ndarray]:
        device = next(reader.parameters()).device
        chosen = np.array(kept_back)
        pixels, words, colours, shown, joints, _ = (part.to(device) for part in batch(data, chosen, seed))
        (*said, painted, posed), _ = reader.read(pixels)
        count = words.shape[1]
        right = torch.stack([logits[:count].argmax(1) for logits in said]) == words
        shares = [f"{kind} {share:.1%}" for kind, share in zip(WORDS, right.float().mean(1).tolist(), strict=True)]
        off = ((painted[:count].unflatten(1, colours.shape[1:]) - colours).abs() * shown).sum() / shown.sum() / 3
        apart = (posed.unflatten(1, (_JOINTS, 2)) - joints[..., :2]).abs()[joints[..., 2] > 0].mean()
        wrong = np.argsort(right.all(0).cpu().numpy(), kind="stable")[:16]
        pictures = np.concatenate([data["pictures"][chosen][:, 0], data["pictures"][chosen][:, 2]])[wrong]
        rows = np.split(pictures, 2) if len(pictures) == 16 else [pictures]
        sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
        return f"{' '.join(shares)} colours {off:.3f} joints {apart:.4f}", sheet

    return inspect
