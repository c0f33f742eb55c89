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
    return method.columns_of(tokens[next(iter(tokens))], _ids(trigger))


def doubts(clip: Any, identity: Identity) -> list[str]:
    """What the text encoder makes of the subject's words and no user means: unknown words, a token in parts."""
    readers = [part.tokenizer for part in vars(clip.tokenizer).values() if hasattr(part, "tokenizer")]
    unknown = {getattr(reader, "unk_token_id", None) for reader in readers} - {None}
    said = [
        f"the text encoder does not know the word {word!r}: choose one that it knows"
        for word in identity.trigger.split()
        if unknown.intersection(_ids(clip.tokenize(word, return_word_ids=True)))
    ]
    parts = len(_ids(clip.tokenize(identity.token, return_word_ids=True)))
    if parts > 1:
        said.append(
            f"identity_token {identity.token!r} is {parts} tokens, whose own meanings stay: a rare word of one, such "
            "as sks, is learnt more surely"
        )
    return said


def _ids(tokens: dict[str, list]) -> list:
    """The ids of a tokenised text, by the first tokeniser, without start, end and padding."""
    return [entry[0] for chunk in next(iter(tokens.values())) for entry in chunk if entry[2] != 0]
