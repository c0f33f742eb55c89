"""Settings of the fusion embedding. Defaults name their source: FPDM (arXiv 2412.07333), or "ours"."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..inputs.ranges import check_limits

# Ours: the least contrast, in 0..1, of a drawing that shows somebody; OpenPose drawings have a black background.
PERSON_THRESHOLD = 0.05
# Published: the CFG of the samples.
GUIDANCE = 2.0
MOST_EMBEDDING_TOKENS = 16
CUSTOM, CONSUMER, PUBLISHED = BUDGETS = ("custom", "consumer", "published")

# By name what a training may cost: settings of its node, and `epochs` in place of steps.
Budgets = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CombinerConfig:
    """Stage 1: the combiner and, if it is trained, the image encoder."""

    # Published: 5 epochs in batches of 48. Ours: a number of steps, since data sets differ in size.
    steps: int = 2000
    batch_size: int = 48
    # Published: AdamW at 1e-5 with weight decay 1e-4, temperature 0.07, L1 weight 1e-4, dropout 0.5.
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    temperature: float = 0.07
    l1: float = 1e-4
    dropout: float = 0.5
    # Published: 768, both of the projections and of the hidden layers.
    projection: int = 768
    hidden: int = 768
    # Published: one trainable CLIP ViT-L/14 for all three pictures.
    train_encoder: bool = True
    # Epochs are times through the data. Ours: what a consumer's card and an evening allow.
    budgets: ClassVar[Budgets] = {
        CONSUMER: {"steps": 2000, "batch_size": 48, "learning_rate": 1e-5, "train_encoder": False},
        PUBLISHED: {"epochs": 5, "batch_size": 48, "learning_rate": 1e-5, "train_encoder": True},
    }

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 1:
            raise ValueError(f"temperature is {self.temperature}: use a number above 0 and up to 1, say 0.07")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}, but targets are retrieved among others: use 2 or more, say 48"
            )


@dataclass(frozen=True)
class GeneratorConfig:
    """Stage 2: appearance tokens, class embedding and pose path, with the whole UNet or a LoRA of it."""

    # Ours: the publication counts epochs of a large data set.
    steps: int = 10_000
    batch_size: int = 1
    # Published: AdamW at 1e-4, the whole UNet. Ours: a LoRA, which trains well at the same rate.
    learning_rate: float = 1e-4
    whole_unet: bool = False
    rank: int = 16
    # Published: the shares in which source, fusion embedding and pose are left out. Ours: per picture, not per batch.
    source_drop: float = 0.2
    fusion_drop: float = 0.2
    pose_drop: float = 0.2
    # Published: 0.1.
    noise_offset: float = 0.1
    # Published: width of the hidden layer of the appearance tokens, and channels of the pose path.
    hidden: int = 768
    pose_channels: tuple[int, ...] = (16, 32, 96, 256)
    # Published: e_f as a class embedding alone. Ours: tokens of e_f beside it; 0 is off.
    embedding_tokens: int = 0
    # Ours: a factor on the learning rate of what reads e_f, and each path's gradient clipped apart; 1 and False are
    # as published.
    embedding_rate: float = 1.0
    clip_by_path: bool = False
    # Ours: at least so high a source_drop in the first so many steps, in which e_f is then all that shows the source.
    early_source_drop: float = 0.8
    early_steps: int = 0
    # Ours: begins with the generator and the UNet that the fusion holds; published: with new paths.
    train_further: bool = False
    # Published: 100 epochs, 42 pairs on each of 3 GPUs.
    budgets: ClassVar[Budgets] = {
        CONSUMER: {"steps": 10_000, "batch_size": 1, "learning_rate": 1e-4, "whole_unet": False, "rank": 16},
        PUBLISHED: {"epochs": 100, "batch_size": 126, "learning_rate": 1e-4, "whole_unet": True},
    }

    def __post_init__(self) -> None:
        for name in ("source_drop", "fusion_drop", "pose_drop", "early_source_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 0 (never) to below 1, 0.2 as published")
        check_limits(self, "embedding_tokens", lowest=0, highest=MOST_EMBEDDING_TOKENS, fix="0 (off) to 16, say 4")
        check_limits(self, "embedding_rate", lowest=0, highest=100, fix="0 (not trained) to 100, 1 as published")
        check_limits(self, "early_steps", lowest=0, fix="0 (off) or more")
        if self.train_further and not self.whole_unet:
            raise ValueError(
                "train_further is on, and a LoRA beside the UNet of an earlier training would need both in one file: "
                "switch whole_unet on, which takes over what the fusion holds, with another budget than consumer, or "
                "train_further off"
            )
        check_limits(self, "noise_offset", lowest=0, highest=1, fix="0 (off) to 1, 0.1 as published")


    def drop(self, condition: str, step: int) -> float:
        """The share of pictures that a step, counted from 0, trains without source, fusion or pose."""
        share = getattr(self, f"{condition}_drop")
        return max(share, self.early_source_drop) if condition == "source" and step < self.early_steps else share


def within_budget(budget: str, budgets: Budgets, pairs: int) -> dict[str, Any]:
    """The settings that a budget, one of BUDGETS, decides for so many pairs; none where it is CUSTOM."""
    chosen = dict(budgets.get(budget, {}))
    if epochs := chosen.pop("epochs", 0):
        chosen["steps"] = math.ceil(epochs * pairs / chosen["batch_size"])
    return chosen


@dataclass(frozen=True)
class ApplyConfig:
    """Sampling with a trained generator."""

    # Published: everything that was trained, at its full weight.
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_limits(self, "strength", lowest=0, highest=2, fix="0 (off) to 1 (as published), at most 2")


@dataclass(frozen=True)
class RetargetConfig:
    """Body proportions of one skeleton on the pose of another; all of it is ours."""

    # 0 keeps the proportions of the pose, 1 takes those of the source.
    amount: float = 1.0
    # Points below this score count as not detected; the default of SDPose Draw Keypoints.
    score_threshold: float = 0.3
    # The largest factor on a limb: a wrongly detected joint must not draw a giant.
    largest_factor: float = 2.0

    def __post_init__(self) -> None:
        check_limits(self, "amount", lowest=0, highest=1, fix="0 (off) to 1 (all of the source's proportions)")
