"""Similarity to references, thresholds from a user's pictures, and groups; without ComfyUI. All of it is ours."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

PASSED, UNCERTAIN, REJECTED = "passed", "uncertain", "rejected"
# Shares of the user's pictures that a threshold may get wrong where the two kinds overlap.
_WRONG = 0.05
_FEW = 10  # pictures of a kind, below which its extremes are chance
_TELLS_APART = 0.8  # how often a picture of the same is above one of another
_COPY = 0.9999


class Thresholds(NamedTuple):
    """A score of `pass_above` or more passes, one below `reject_below` is rejected; between them it is uncertain."""

    pass_above: float
    reject_below: float

    def verdict(self, score: float) -> str:
        """passed, uncertain or rejected."""
        if score >= self.pass_above:
            return PASSED
        return REJECTED if score < self.reject_below else UNCERTAIN


class Calibration(NamedTuple):
    """Thresholds, how well they do on the pictures that they come from, and what makes them doubtful."""

    thresholds: Thresholds
    result: str
    doubts: list[str]


class Group(NamedTuple):
    """Pictures of one kind: their mean score and its standard error, how many they are, and how many passed."""

    name: str
    mean: float
    error: float
    count: int
    passed: int

    def __str__(self) -> str:
        error = f" ± {self.error:.3f}" if self.count > 1 else ""
        return f"{self.name}: {self.mean:.3f}{error}, {self.passed} of {self.count} passed"


def scores(embeddings: torch.Tensor, references: torch.Tensor, paired: bool = False) -> torch.Tensor:
    """The mean cosine of each embedding [N, D] with the references [R, D], or with its own, in turn: [N], -1..1."""
    return _cosines(embeddings, references, paired).mean(1)


def has_copies(embeddings: torch.Tensor, references: torch.Tensor, paired: bool = False) -> bool:
    """Whether one of the embeddings is that of its reference, which makes its score too good."""
    return bool((_cosines(embeddings, references, paired) > _COPY).any())


def _cosines(embeddings: torch.Tensor, references: torch.Tensor, paired: bool) -> torch.Tensor:
    """[N, R] of each with each, or [N, 1] of each with one reference, which are taken in turn."""
    embeddings, references = (F.normalize(part.double(), dim=-1) for part in (embeddings, references))
    if not paired:
        return embeddings @ references.T
    in_turn = references[torch.arange(len(embeddings)) % len(references)]
    return (embeddings * in_turn).sum(1, keepdim=True)


def groups(texts: Sequence[str], scores: Sequence[float], verdicts: Sequence[str]) -> list[Group]:
    """The groups that the pictures' texts name, the lowest mean first; commas and lines divide a text."""
    members: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        for name in dict.fromkeys(" ".join(part.split()) for part in re.split("[,;，、；\n]", text)):
            if name:
                members.setdefault(name, []).append(i)
    found = []
    for name, which in members.items():
        values = torch.tensor([scores[i] for i in which], dtype=torch.float64)
        error = float(values.std()) / len(which) ** 0.5 if len(which) > 1 else 0.0
        passed = sum(verdicts[i] == PASSED for i in which)
        found.append(Group(name, float(values.mean()), error, len(which), passed))
    return sorted(found, key=lambda group: group.mean)


def calibrate(same: torch.Tensor | None, other: torch.Tensor | None) -> Calibration:
    """Thresholds from scores [N] of the same one and [M] of others; one of them may be missing.

    Where the two do not overlap, both thresholds are in the middle of the gap. Where they do, 5 % of the others would
    pass and 5 % of the same be rejected, and what is between is uncertain.
    """
    doubts = [
        f"{name}: {len(values)} pictures are few: 10 or more make the thresholds surer"
        for name, values in (("same", same), ("other", other)) if values is not None and len(values) < _FEW
    ]
    if same is None or other is None:
        name, edge = ("same", same.min()) if other is None else ("other", other.max())
        doubts.append(f"only {name} is connected, so its extreme is the threshold: connect both, to compare them")
        return Calibration(Thresholds(float(edge), float(edge)), f"the extreme of {name}", doubts)
    low, high = (float(torch.quantile(*part)) for part in ((same, _WRONG), (other, 1 - _WRONG)))
    if same.min() > other.max():
        middle = float(same.min() + other.max()) / 2
        thresholds = Thresholds(middle, middle)
    elif low >= high:
        thresholds = Thresholds((low + high) / 2, (low + high) / 2)
    else:
        thresholds = Thresholds(high, low)
    above = (same[:, None] > other).double().mean() + (same[:, None] == other).double().mean() / 2
    if above < _TELLS_APART:
        doubts.append(
            f"same is above other in {float(above):.0%} of pairs only, so this encoder does not tell them apart: use "
            "another CLIP Vision, or crop all pictures to the face"
        )
    passed = float((same >= thresholds.pass_above).double().mean())
    rejected = float((other < thresholds.reject_below).double().mean())
    result = f"{passed:.0%} of same pass and {rejected:.0%} of other are rejected"
    return Calibration(thresholds, result, doubts)
