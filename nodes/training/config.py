"""The settings that every training run has, whatever the method. Defaults name their source, or "ours"."""

from dataclasses import dataclass

import torch

from ..inputs.ranges import check_choice, check_limits

DTYPES = ("model", "fp32", "bf16")
ADAMW, MUON = OPTIMIZERS = ("AdamW", "Muon")


@dataclass(frozen=True)
class TrainingConfig:
    """One run of `steps` optimiser steps. Raises ValueError, naming the field, for a value out of its range."""

    steps: int
    learning_rate: float
    seed: int = 0
    batch_size: int = 1
    # AdamW's own default (Loshchilov and Hutter, arXiv 1711.05101, as PyTorch ships it).
    weight_decay: float = 0.01
    # Ours, as common in diffusion training: gradients are clipped to this norm.
    max_gradient_norm: float = 1.0
    # Ours: the share of the steps, at the end, over which the learning rate falls linearly to 0; 0 keeps it constant.
    decay: float = 0.0
    # Muon (Jordan 2024), for matrices alone; scaled as by Liu et al., arXiv 2502.16982: rates are of AdamW's size.
    optimizer: str = ADAMW
    # Min-SNR weighting (Hang et al., arXiv 2303.09556): 5 is the published value, 0 is off.
    min_snr_gamma: float = 0.0
    gradient_checkpointing: bool = False
    # Whether the frozen weights stay in main memory and stream in, layer by layer.
    offload: bool = False
    # Ours: what the model computes in; "model" is its own type, but never fp16, where small gradients vanish.
    dtype: str = "model"
    # Optimiser steps between previews and between checkpoints; 0 is never.
    preview_every: int = 0
    checkpoint_every: int = 100
    # Optimiser steps in one step as the node counts them, which is how the run is reported.
    steps_per_iteration: int = 1

    def __post_init__(self) -> None:
        check_limits(self, "steps", "batch_size", "steps_per_iteration", lowest=1, fix="1 or more")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}: use a number above 0 and below 1, say 1e-4")
        from_zero = "min_snr_gamma", "weight_decay", "decay", "preview_every", "checkpoint_every"
        check_limits(self, *from_zero, lowest=0, fix="0 (off) or more")
        check_limits(self, "decay", lowest=0, highest=1, fix="a share of the steps, 0 (off) to 1")
        check_choice(self, dtype=DTYPES, optimizer=OPTIMIZERS)
        if self.optimizer == MUON and not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"PyTorch {torch.__version__} has no Muon: set optimizer to AdamW, or update PyTorch to 2.9 or later"
            )

    def counted(self, step: int) -> str:
        """The place of `step` finished optimiser steps in the run, in steps as the node counts them."""
        each = self.steps_per_iteration
        return f"{-(-step // each)} of {-(-self.steps // each)}"

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: it depends on nothing else, so a resumed run repeats it."""
        if not self.decay:
            return self.learning_rate
        return self.learning_rate * min(1.0, (self.steps - step) / (self.decay * self.steps))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of linear layers: W + (alpha / rank) up @ down (Hu et al., arXiv 2106.09685)."""

    rank: int = 8
    # Ours: None is a scale of 1 for every rank, so that a learning rate suits all of them.
    alpha: float | None = None
    # Which layers, by a regular expression on their names in the model; by default those of attention.
    layers: str = (
        r"att(?:entio)?n.*\.(to_[qkv]|to_out\.0|[qkvo]|k_img|v_img|qkv|proj|out_proj|out"
        # AuraFlow and Krea 2, Kandinsky, Mochi
        r"|w[12]?[qkvo]|to_query|to_key|to_value|out_layer|(?:qkv|proj)_[xy])$"
    )

    def __post_init__(self) -> None:
        check_limits(self, "rank", lowest=1, fix="1 or more")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank
