"""Action identifier: tokens for each cross-attention layer that put an action, and nothing else, on any subject.

Source: ADI (arXiv 2311.15841); the masks' formulas are in kernels/channel_mask.py. Contexts are what the
cross-attention layers read, [L, T, C]: one encoded prompt of T tokens for each of L places in the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...kernels.channel_mask import channel_mask
from ..errors import shown_by_name

# The encoder's name in an identifier that fits whichever encoder has its width.
ANY_ENCODER = "any"


class Place(NamedTuple):
    """Neighbouring cross-attention layers that share a token: `input`, `middle`, `output` or `double_block` number
    `index` of the network, with `layers` of them (SDXL has up to 10 in one place, others 1).
    """

    kind: str
    index: int
    layers: int

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


@shown_by_name
class ActionError(ValueError):
    """An identifier that is none, or does not fit; the message says what was expected and found."""


@dataclass(frozen=True)
class ActionIdentifier:
    """One learnt action. tokens[encoder]: [L, n, D] for the n tokens that stand for `placeholder`, fp32.

    `places` are the L places of the network it was learnt for; without any, L is 1 and it fits every network.
    `initial_word` is what the placeholder means at strength 0; `base` is the fingerprint of the model, or empty.
    Raises ActionError for tokens of another form, not finite ones included.
    """

    placeholder: str
    initial_word: str
    tokens: Mapping[str, torch.Tensor]
    places: tuple[Place, ...] = ()
    base: str = ""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ActionError("it has no tokens")
        layers = max(1, len(self.places))
        for encoder, tokens in self.tokens.items():
            if tokens.ndim != 3 or tokens.shape[0] != layers or tokens.numel() == 0:
                raise ActionError(
                    f"its tokens of encoder {encoder} have shape {tuple(tokens.shape)}, expected [{layers}, tokens, "
                    "width]"
                )
            if not tokens.is_floating_point() or not torch.isfinite(tokens).all():
                raise ActionError(f"its tokens of encoder {encoder} hold values that are no finite numbers")

    def for_encoders(self, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The tokens by encoder of a text encoder model with these widths. Raises ActionError where they differ."""
        if ANY_ENCODER in self.tokens and len(widths) == 1:
            found = {encoder: self.tokens[ANY_ENCODER] for encoder in widths}
        else:
            found = dict(self.tokens)
        have = {encoder: tokens.shape[-1] for encoder, tokens in found.items()}
        if have != dict(widths):
            raise ActionError(
                f"{self.placeholder} was learnt for another kind of model, with {_encoders(have)}, and this clip has "
                f"{_encoders(widths)}: connect the clip of the model that it was learnt with"
            )
        return found


def _encoders(widths: Mapping[str, int]) -> str:
    listed = ", ".join(f"{encoder} of width {width}" for encoder, width in sorted(widths.items()))
    return f"text encoder{'s' * (len(widths) > 1)} {listed}"


def check_places(expected: Sequence[Place], found: Sequence[Place], placeholders: str) -> None:
    """Raises ActionError where an identifier for the places `expected` meets a network with others."""
    if expected and tuple(expected) != tuple(found):
        differing = next((pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), None)
        first = "" if differing is None else f"; the first that differs is {differing[0]}, here {differing[1]}"
        raise ActionError(
            f"{placeholders} was learnt for another kind of model, with {_count(expected)}, and this one has "
            f"{_count(found)}{first}: connect the model that it was learnt with, or one of its kind"
        )


def _count(places: Sequence[Place]) -> str:
    return f"{sum(place.layers for place in places)} cross-attention layers in {len(places)} places"


@dataclass(frozen=True)
class Rows:
    """`count` samples of a batch: their contexts [1 or count, L, T, C], or None for those without an action."""

    count: int
    contexts: torch.Tensor | None


@dataclass(frozen=True)
class BatchContexts:
    """The contexts of a whole batch, in its order, for a call whose prompts have `length` tokens."""

    rows: tuple[Rows, ...]
    length: int = 0

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], length: int) -> BatchContexts:
        """With change(contexts) in place of each tensor of contexts, for prompts of `length` tokens."""
        return BatchContexts(tuple(
            row if row.contexts is None else Rows(row.count, change(row.contexts)) for row in self.rows
        ), length)

    def at(self, layer: int, context: torch.Tensor) -> torch.Tensor:
        """What layer number `layer` reads where all layers would read `context` [B, T, C].

        The prompts are its last `length` tokens; what a model puts before them stays.
        """
        before, prompts = context[:, : -self.length], context[:, -self.length :]
        parts = []
        for row, plain in zip(self.rows, prompts.split([row.count for row in self.rows]), strict=True):
            if row.contexts is None:
                parts.append(plain)
                continue
            own = row.contexts[:, min(layer, row.contexts.shape[1] - 1)].to(context)
            parts.append(own.expand(row.count, -1, -1))
        # Attention gives the same for keys that are all repeated equally often.
        length = math.lcm(*(part.shape[1] for part in parts))
        joined = torch.cat([part.repeat(1, length // part.shape[1], 1) for part in parts])
        return torch.cat([before, joined], dim=1) if before.shape[1] else joined


def blended(plain: torch.Tensor, contexts: torch.Tensor, strength: float) -> torch.Tensor:
    """From the plain prompt [1, T, C] at strength 0 to the contexts [L, T, C] at 1, and as far again beyond at 2."""
    if strength == 1:
        return contexts
    if plain.shape[1] != contexts.shape[1]:
        raise ActionError(
            f"the prompt takes {contexts.shape[1]} tokens with the action and {plain.shape[1]} with its initial "
            "word, so nothing lies between them: set strength to 0 or 1, or change the length of the prompt"
        )
    return plain + strength * (contexts - plain)


class Triple(NamedTuple):
    """Indices of the exemplars of a step: the anchor, whose contrast belongs to it, and another of the action."""

    anchor: int
    other: int


def draw_triple(count: int, generator: torch.Generator) -> Triple:
    """Two different exemplars of `count`."""
    anchor, other = torch.randperm(count, generator=generator)[:2].tolist()
    return Triple(anchor, other)


class TripleObjective:
    """The anchor's denoising error, whose gradient follows the channels of the action alone.

    tokens: name -> parameter [L, n, D]. loss(triple, copies, noise seed's generator) -> errors [3] of the anchor, the
    other exemplar and the contrast, in one forward pass; copies[name] is [3, L, n, D], each sample's own tokens.
    After a call, `masks` say which elements the step may move. For the training loop.
    """

    def __init__(
        self,
        loss: Callable[[Triple, dict[str, torch.Tensor], torch.Generator], torch.Tensor],
        tokens: Mapping[str, torch.Tensor],
        exemplars: int,
        percentile: float,
        merge: str,
    ):
        self.loss = loss
        self.tokens = tokens
        self.exemplars = exemplars
        self.percentile = percentile
        self.merge = merge
        self.masks: dict[str, torch.Tensor] = {}

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        triple = draw_triple(self.exemplars, generator)
        copies = {
            name: token.detach().expand(3, *token.shape).clone().requires_grad_()
            for name, token in self.tokens.items()
        }
        errors = self.loss(triple, copies, generator)
        # The samples of a batch do not meet, so each copy's gradient is that of its own error.
        gradients = torch.autograd.grad(errors.sum(), list(copies.values()))
        # What is not finite must stop the run, though the mask may hide it.
        finite = all(found.isfinite().all() for found in (errors, *gradients))
        value = errors.detach()[0] if finite else torch.full_like(errors.detach()[0], float("nan"))
        for (name, token), gradient in zip(self.tokens.items(), gradients, strict=True):
            anchor, same_action, same_context = gradient
            self.masks[name] = channel_mask(anchor, same_action, same_context, self.percentile, self.merge)
            # Zero in value; its gradient is the anchor's, where it may act.
            value = value + ((token - token.detach()) * (anchor * self.masks[name])).sum()
        return value


def mean_token(tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One token [n, D] for all layers: the mean over them. Ours, for hosts that know one embedding a word."""
    return {encoder: token.float().mean(0) for encoder, token in tokens.items()}


def describe(actions: Sequence[Any]) -> str:
    """The placeholders of some identifiers, for a message."""
    return ", ".join(action.placeholder for action in actions)
