"""The subject in a prompt: its words put in, and a CONDITIONING that remembers which of its tokens they are."""

from __future__ import annotations

from typing import Any

from . import capture, method
from .method import Identity

# Encoders whose tokens stand side by side with each other: SDXL's two count the same ones.
_SHARED = {"l", "g"}


def encode(clip: Any, identity: Identity, text: str) -> list:
    """A CONDITIONING of `text`, as CLIP Text Encode makes it, its entries with the subject's columns.

    Raises ValueError where the text does not name the subject, or it falls out of the encoder's view.
    """
    expanded = identity.expand(text)
    return remembering(clip.encode_from_tokens_scheduled(clip.tokenize(expanded)), clip, identity, expanded)


def remembering(conditioning: list, clip: Any, identity: Identity, text: str) -> list:
    """The CONDITIONING with the columns in which its layers read the subject, those of `text`.

    Raises ValueError as `encode` does.
    """
    tokens = clip.tokenize(text, return_word_ids=True)
    columns = subject_columns(tokens, clip.tokenize(identity.trigger, return_word_ids=True))
    if not columns:
        raise ValueError(
            f"the tokens of {identity.trigger!r} are not found in those of the text: write {method.SUBJECT} once, "
            "between spaces, without weights inside it"
        )
    width = min(tensor.shape[1] for tensor, _ in conditioning)
    if columns[-1] >= width:
        raise ValueError(f"the text is longer than the {width} tokens that are encoded: name the subject earlier")
    return [[tensor, {**options, capture.SUBJECT_COLUMNS: columns}] for tensor, options in conditioning]


def subject_columns(tokens: dict[str, list], trigger: dict[str, list]) -> tuple[int, ...]:
    """The columns of the trigger's tokens, from the host's tokenised text. Raises ValueError for encoders that put
    texts of several tokenisers one after the other.
    """
    if len(tokens) > 1 and not tokens.keys() <= _SHARED:
        raise ValueError(
            f"this text encoder joins {', '.join(tokens)}, whose columns are not known: use an SD, SDXL or Wan model"
        )
    name = next(iter(tokens))
    phrase = [entry[0] for chunk in trigger[name] for entry in chunk if entry[2] != 0]
    return method.columns_of(tokens[name], phrase)
