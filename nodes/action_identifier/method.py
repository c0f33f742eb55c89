"""Action identifier: tokens for each cross-attention layer that put an action, and nothing else, on any subject.

Source: ADI (arXiv 2311.15841); the masks' formulas are in kernels/channel_mask.py. Contexts, [L, T, C], are what the
cross-attention layers read: one encoded prompt of T tokens for each of L places in the network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...kernels.channel_mask import channel_mask
from ..consent.record import ConsentRecord
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
    """An identifier that is not valid, or does not fit; the message says what was expected and found."""


@dataclass(frozen=True)
class ActionIdentifier:
    """One trained action. tokens[encoder]: [L, n, D] for the n tokens that stand for `placeholder`, fp32.

    `places` are the L places of the network it was trained for; without any, L is 1 and it fits every network.
    `initial_word` is what the placeholder means at strength 0; `base` is the fingerprint of the model, or empty;
    `consent` is that to the pictures, if there is a record. `offsets` [L, n, C], where there are any, are added to
    what the text encoder makes of the n tokens, as the textual bypass of NeTI (arXiv 2305.15391) is.
    Raises ActionError for tokens of another shape or with values that are not finite.
    """

    placeholder: str
    initial_word: str
    tokens: Mapping[str, torch.Tensor]
    places: tuple[Place, ...] = ()
    base: str = ""
    consent: ConsentRecord | None = None
    offsets: torch.Tensor | None = None

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
                raise ActionError(f"its tokens of encoder {encoder} hold values that are not finite numbers")
        if self.offsets is not None:
            counts = {tokens.shape[1] for tokens in self.tokens.values()}
            if self.offsets.ndim != 3 or self.offsets.shape[0] != layers or {self.offsets.shape[1]} != counts:
                raise ActionError(
                    f"its offsets have shape {tuple(self.offsets.shape)}, expected [{layers}, "
                    f"{' or '.join(map(str, sorted(counts)))}, width]"
                )
            if not self.offsets.is_floating_point() or not torch.isfinite(self.offsets).all():
                raise ActionError("its offsets hold values that are not finite numbers")

    def for_encoders(self, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The tokens by encoder of a text encoder model with these widths. Raises ActionError where they differ."""
        if ANY_ENCODER in self.tokens and len(widths) == 1:
            by_encoder = {encoder: self.tokens[ANY_ENCODER] for encoder in widths}
        else:
            by_encoder = dict(self.tokens)
        trained_widths = {encoder: tokens.shape[-1] for encoder, tokens in by_encoder.items()}
        if trained_widths != dict(widths):
            raise ActionError(
                f"{self.placeholder} was trained for another kind of model, with {_encoders(trained_widths)}, and "
                f"this clip has {_encoders(widths)}: connect the clip of the model that it was trained with"
            )
        return by_encoder


def _encoders(widths: Mapping[str, int]) -> str:
    listed = ", ".join(f"{encoder} of width {width}" for encoder, width in sorted(widths.items()))
    return f"text encoder{'s' * (len(widths) > 1)} {listed}"


def placeholders(actions: Sequence[ActionIdentifier]) -> str:
    """The placeholders of some identifiers, for a message."""
    return ", ".join(action.placeholder for action in actions)


def check_places(action: ActionIdentifier, places: Sequence[Place]) -> None:
    """Raises ActionError where an identifier meets a network with other places than it was trained for."""
    expected = action.places
    if expected and expected != tuple(places):
        differing = next((pair for pair in zip(expected, places, strict=False) if pair[0] != pair[1]), None)
        first = "" if differing is None else f"; the first that differs is {differing[0]}, here {differing[1]}"
        raise ActionError(
            f"{action.placeholder} was trained for another kind of model, with {_count(expected)}, and this one has "
            f"{_count(places)}{first}: connect the model that it was trained with, or one of its kind"
        )


def _count(places: Sequence[Place]) -> str:
    return f"{sum(place.layers for place in places)} cross-attention layers in {len(places)} places"


def blended(plain: torch.Tensor, contexts: torch.Tensor, strength: float) -> torch.Tensor:
    """From the plain prompt [1, T, C] at strength 0 to the contexts [L, T, C] at 1, and as far again beyond at 2.

    Raises ActionError where their lengths differ and strength is not 1.
    """
    if strength == 1:
        return contexts
    if plain.shape[1] != contexts.shape[1]:
        raise ActionError(
            f"the prompt takes {contexts.shape[1]} tokens with the action and {plain.shape[1]} with its initial "
            "word, so nothing lies between them: set strength to 0 or 1, or change the length of the prompt"
        )
    return plain + strength * (contexts - plain)


class Triple(NamedTuple):
    """Indices of two exemplars: the anchor, with which goes its contrast, and another of the same action."""

    anchor: int
    other: int


@dataclass
class TripleObjective:
    """The error of two exemplars, whose gradient follows the channels of the action alone. For the training loop.

    Published is the anchor's gradient. Ours is the mean of its and of the other exemplar's, which is computed for the
    masks anyway: it has more signal for its noise.

    tokens: name -> parameter [L, n, D]. triple_loss(triple, copies, generator) -> errors [3] of the anchor, the other
    exemplar and the contrast, in one forward pass with one noise and one noise level; copies[name] is [3, L, n, D],
    the tokens of each sample. After a call, `masks` say which elements the step may move.
    """

    triple_loss: Callable[[Triple, dict[str, torch.Tensor], torch.Generator], torch.Tensor]
    tokens: Mapping[str, torch.Tensor]
    exemplars: int
    percentile: float
    merge: str
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        triple = Triple(*torch.randperm(self.exemplars, generator=generator)[:2].tolist())
        copies = {
            name: token.detach().expand(3, *token.shape).clone().requires_grad_()
            for name, token in self.tokens.items()
        }
        errors = self.triple_loss(triple, copies, generator)
        # The samples of a batch do not meet, so each copy's gradient is that of its own error.
        gradients = torch.autograd.grad(errors.sum(), list(copies.values()))
        # What is not finite must stop the run, though the mask may hide it.
        finite = all(values.isfinite().all() for values in (errors, *gradients))
        value = errors.detach()[:2].mean() if finite else torch.full_like(errors.detach()[0], float("nan"))
        for (name, token), gradient in zip(self.tokens.items(), gradients, strict=True):
            anchor, same_action, same_context = gradient
            self.masks[name] = channel_mask(anchor, same_action, same_context, self.percentile, self.merge)
            # Zero in value; its gradient is that of both exemplars, where it may act.
            both = (anchor + same_action) / 2
            value = value + ((token - token.detach()) * (both * self.masks[name])).sum()
        return value


@dataclass
class BatchObjective:
    """The mean denoising error of a random batch of exemplars, as P+ (arXiv 2303.09522) trains layer-wise tokens:
    no triples and no masks. For the training loop.

    batch_loss(exemplar_ids, generator) -> errors [B].
    """

    batch_loss: Callable[[list[int], torch.Generator], torch.Tensor]
    exemplars: int
    batch_size: int

    def __call__(self, _step: int, generator: torch.Generator) -> torch.Tensor:
        exemplar_ids = torch.randperm(self.exemplars, generator=generator)[: self.batch_size].tolist()
        return self.batch_loss(exemplar_ids, generator).mean()


@dataclass
class ContextObjective:
    """The denoising error of one exemplar after the other, for the token of its surroundings. For the training loop.

    exemplar_loss(exemplar_id, generator) -> its error [1].
    """

    exemplar_loss: Callable[[int, torch.Generator], torch.Tensor]
    exemplars: int

    def __call__(self, step: int, generator: torch.Generator) -> torch.Tensor:
        return self.exemplar_loss(step % self.exemplars, generator).mean()
