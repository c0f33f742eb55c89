"""The theatre's image encoder in training: transformers' CLIP, which learns to read what the renderer knows.

Its embedding has to tell species, pattern, headwear, detail, scene, action, colours and joints, of an OpenPose
drawing the joints alone; each patch token its own pixels and the parts in them. The readouts are not kept.
"""

import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import clip_preprocess
from fusion_pairs import Config, takes
from pack.nodes.puppets.config import (
    ACTIONS,
    DETAILS,
    HEADWEAR,
    PART_NAMES,
    PATTERNS,
    SCENES,
    SPECIES,
    Take,
)
from pack.nodes.puppets.vision import VISION_CONFIG
from timeboxed import Optimiser, Stage, autocast
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WORDS = {
    "species": SPECIES, "pattern": PATTERNS, "headwear": HEADWEAR, "detail": DETAILS, "scene": SCENES,
    "action": ACTIONS,
}
_COLOURS = ("skin", "accent", "shirt", "pattern_colour", "trousers", "headwear_colour", "detail_colour")
_JOINTS, _PATCH, _CELLS = 36, VISION_CONFIG["patch_size"], 4  # numbers a pose; pixels and cells of a patch's side
_COLOUR_WEIGHT, _JOINT_WEIGHT, _PIXEL_WEIGHT, _PART_WEIGHT = 10.0, 20.0, 2.0, 0.5


class Reader(nn.Module):
    """The encoder with its readouts."""

    def __init__(self):
        super().__init__()
        hosts_own = ("model_type", "image_mean", "image_std")
        known = {key: value for key, value in VISION_CONFIG.items() if key not in hosts_own}
        self.encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**known))
        width, answers = VISION_CONFIG["hidden_size"], sum(map(len, WORDS.values()))
        self.embedding_readout = nn.Linear(VISION_CONFIG["projection_dim"], answers + 3 * len(_COLOURS) + _JOINTS)
        self.token_readout = nn.Linear(width, 3 * _PATCH**2 + len(PART_NAMES) * _CELLS**2)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Readouts of embeddings [B, n] and of patch tokens [B, T, m], of prepared pixels."""
        seen = self.encoder(pixel_values=pixels)
        return self.embedding_readout(seen.image_embeds), self.token_readout(seen.last_hidden_state[:, 1:])


def prepared(pictures: np.ndarray) -> torch.Tensor:
    """float [B, 3, 64, 64] of uint8 [B, H, W, 3], as the host prepares them for this encoder."""
    images = torch.from_numpy(np.array(pictures)).float() / 255
    return clip_preprocess(
        images, size=VISION_CONFIG["image_size"], mean=VISION_CONFIG["image_mean"], std=VISION_CONFIG["image_std"],
        crop=False,
    )


def answers(shown: list[Take]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The right words, positions [B] by kind; colours [B, 7, 3]; and which of those are to be seen, [B, 7, 1]."""
    words = {
        kind: torch.tensor([names.index(getattr(take.identity, kind, None) or getattr(take, kind)) for take in shown])
        for kind, names in WORDS.items()
    }
    colours = torch.tensor([[getattr(take.identity, name) for name in _COLOURS] for take in shown])
    there = torch.ones(len(shown), len(_COLOURS), 1)
    for i, take in enumerate(shown):
        who = take.identity
        there[i, 3] = who.pattern != "plain"
        there[i, 5] = who.headwear != "none"
        there[i, 6] = who.detail not in ("none", "ear")
    return words, colours, there


def loss_of(reader: Reader, data: dict[str, np.ndarray], chosen: np.ndarray, config: Config) -> tuple:
    """The loss of some pairs, and how often each word is read right, {kind: share}."""
    count = len(chosen)
    both = [take for i in chosen for take in takes(int(i), config.seed)]
    pictures = prepared(data["pictures"][chosen][:, [0, 2]].reshape(2 * count, config.size, config.size, 3))
    drawings = prepared(data["pictures"][chosen][:, 1])
    joints = torch.from_numpy(np.array(data["joints"][chosen]))
    read, tokens = reader(torch.cat([pictures, drawings]))
    said, colours, found = read.split([sum(map(len, WORDS.values())), 3 * len(_COLOURS), _JOINTS], dim=1)
    words, right, there = answers(both)
    loss, shares = 0.0, {}
    for (kind, wanted), logits in zip(words.items(), said[: 2 * count].split(list(map(len, WORDS.values())), 1)):
        loss = loss + F.cross_entropy(logits, wanted)
        shares[kind] = float((logits.argmax(1) == wanted).float().mean())
    difference = (colours[: 2 * count].unflatten(1, right.shape[1:]) - right).abs() * there
    wanted_joints = torch.cat([joints.flatten(0, 1), joints[:, 1]]).flatten(1)
    apart = (found - wanted_joints).abs().mean()
    shares |= {"colour error": difference.sum().item() / there.sum().item() / 3, "joint error": 128 * apart.item()}
    pixels, parts = tokens.split([3 * _PATCH**2, len(PART_NAMES) * _CELLS**2], dim=2)
    shown = torch.cat([pictures, drawings])
    patches = F.unfold(shown, _PATCH, stride=_PATCH).mT
    side = VISION_CONFIG["image_size"] // _PATCH
    cells = torch.from_numpy(np.array(data["parts"][chosen])).long().flatten(0, 1)
    cells = cells.reshape(-1, side, _CELLS, side, _CELLS).transpose(2, 3).reshape(-1, side**2, _CELLS**2)
    named = parts[: 2 * count].unflatten(2, (_CELLS**2, len(PART_NAMES)))
    loss = loss + _COLOUR_WEIGHT * difference.sum() / there.sum() + _JOINT_WEIGHT * apart
    loss = loss + _PIXEL_WEIGHT * (pixels - patches).abs().mean()
    loss = loss + _PART_WEIGHT * F.cross_entropy(named.flatten(0, 2), cells.flatten())
    return loss, shares


def train(state, data: dict[str, np.ndarray], config: Config, deadline: float) -> bool:
    """Trains the encoder until done or the deadline; True when it is done."""
    torch.manual_seed(config.seed)
    reader = Reader()
    optimiser = Optimiser(reader, config.vision_matrix_lr, config.vision_lr)
    stage = Stage(state / "vision.pt", optimiser, config.vision_steps, {"reader": reader}, deadline)

    def step(index: int) -> torch.Tensor:
        rng = np.random.default_rng([config.seed, 0x715, index])
        chosen = np.sort(rng.choice(config.pairs - config.kept_back, config.vision_batch, replace=False))
        with autocast(torch.device("cpu")):
            return loss_of(reader, data, chosen, config)[0]

    def report() -> str:
        with torch.no_grad():
            shares = loss_of(reader, data, np.arange(config.pairs - config.kept_back, config.pairs), config)[1]
        return ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items())

    return stage.run(step, report)


def weights(state) -> dict[str, torch.Tensor]:
    """What has been trained, under the host's names."""
    kept = torch.load(state / "vision.pt", map_location="cpu", weights_only=True)["modules"]["reader"]
    return {key.removeprefix("encoder."): value for key, value in kept.items() if key.startswith("encoder.")}
