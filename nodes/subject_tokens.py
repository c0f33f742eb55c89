"""The subject that an identity prior knows: its words in a prompt, and which tokens of a CONDITIONING they are.

Every room that encodes prompts or looks for the subject reads it here; this module imports no ComfyUI.
"""

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .consent.record import ConsentRecord
from .inputs.words import replace_words, words_pattern

SUBJECT = "{subject}"
# The option of a CONDITIONING's entry with the subject's token positions. Checkpoints hold digests of conditionings,
# so the string stays.
SUBJECT_TOKENS = "understudy_subject_columns"
# SDXL's two encoders count tokens in the same way; other pairs put their encoded texts one after the other.
_SIDE_BY_SIDE = {"l", "g"}


@dataclass(frozen=True)
class Subject:
    """Who or what a prior knows: its token and class in prompts, the captions it was trained on, the fingerprint
    of the base model, and the consent to it. Raises ValueError for a token of several words, or no class.
    """

    token: str
    class_noun: str
    captions: tuple[str, ...] = ()
    base: str = ""
    consent: ConsentRecord | None = None

    def __post_init__(self) -> None:
        if len(self.token.split()) != 1 or not self.class_noun.strip():
            raise ValueError(
                f"identity_token is {self.token!r} and class_noun {self.class_noun!r}: give one rare word such as "
                "sks, and what the subject is, such as dog"
            )

    @property
    def noun(self) -> str:
        """The class noun in single spaces."""
        return " ".join(self.class_noun.split())

    @property
    def trigger(self) -> str:
        """The words for the subject in a prompt."""
        return f"{self.token} {self.noun}"

    def expand(self, text: str, name: str = "text") -> str:
        """`text` with the subject's words. Raises ValueError, naming the input, where the text has no subject."""
        expanded = self._filled(text)
        if not words_pattern([self.trigger], re.IGNORECASE).search(expanded):
            raise ValueError(
                f"{name} does not name the subject: {text!r} has neither {SUBJECT} nor {self.trigger!r} as separate "
                f"words. Write {SUBJECT} where the subject belongs"
            )
        return expanded

    def as_class_prompt(self, text: str) -> str:
        """`text` about any member of the class."""
        text = self._filled(text)
        # The token alone, as well: beside the class it would come to mean any member.
        for words in (self.trigger, self.token):
            text = replace_words(text, [words], lambda _words: self.noun, re.IGNORECASE)
        return text

    def _filled(self, text: str) -> str:
        text = replace_words(text, [SUBJECT], lambda _subject: self.trigger)
        return " ".join(replace_words(text, [self.trigger], str, re.IGNORECASE).split())


def encode(clip: Any, subject: Subject, text: str) -> list:
    """A CONDITIONING of `text`, as CLIP Text Encode makes it, with the subject's tokens tagged.

    Raises ValueError where the text does not name the subject, or names it beyond the tokens that are encoded.
    """
    expanded = subject.expand(text)
    return tag_subject_tokens(clip.encode_from_tokens_scheduled(clip.tokenize(expanded)), clip, subject, expanded)


def tag_subject_tokens(conditioning: list, clip: Any, subject: Subject, text: str) -> list:
    """The CONDITIONING with the positions of the subject's tokens, those of `text`, in each of its entries.

    As it is where the positions cannot be told: some encoders join several texts, or put the text into a template and
    cut off what is not known. Raises ValueError as `encode` does.
    """
    tokens = clip.tokenize(text, return_word_ids=True)
    width = min(tensor.shape[1] for tensor, _ in conditioning)
    if _joined(tokens) or _template(clip):
        positions = _positions_in_template(clip, subject, tokens, width)
        if not positions:
            return conditioning
    else:
        positions = subject_positions(tokens, clip.tokenize(subject.trigger, return_word_ids=True))
    if not positions:
        raise ValueError(
            f"the tokens of {subject.trigger!r} are not among those of the text: write {SUBJECT} once, between "
            "spaces, without weights inside it"
        )
    if positions[-1] >= width:
        raise ValueError(f"the text is longer than the {width} tokens that are encoded: name the subject earlier")
    return [[tensor, {**options, SUBJECT_TOKENS: positions}] for tensor, options in conditioning]


def subject_positions(tokens: Mapping[str, list], trigger: Mapping[str, list]) -> tuple[int, ...]:
    """The positions of the trigger's tokens in a text, both as ComfyUI tokenizes them, by encoder.

    Raises ValueError for encoders that put the texts of several tokenizers one after the other.
    """
    check_side_by_side(tokens)
    return token_positions(tokens[next(iter(tokens))], _ids(trigger))


def _positions_in_template(clip: Any, subject: Subject, tokens: Mapping[str, list], width: int) -> tuple[int, ...]:
    """The positions of the subject's tokens among `width` encoded ones; none where they cannot be told.

    Only one of several encoders may have so many tokens; of a template, the encoder may cut off what is before the
    text, or what is around it.
    """
    found = []
    for name, chunks in tokens.items():
        ids, template = ([entry[0] for chunk in part for entry in chunk] for part in (chunks, _empty(clip)[name]))
        before = len(os.path.commonprefix([ids, template]))
        after = len(os.path.commonprefix([ids[before:][::-1], template[before:][::-1]]))
        missing = len(ids) - width
        cut = before if before <= missing <= before + after else 0
        if missing in (0, *range(before, before + after + 1)):
            # After a space, a word has other tokens in some vocabularies.
            phrases = {tuple(_own_ids(clip, lead + subject.trigger, name)[skipped:])
                       for lead in ("", "a ") for skipped in (len(_own_ids(clip, lead.strip(), name)),)}
            places = {place for phrase in phrases for place in token_positions(chunks, phrase)}
            found.append(tuple(sorted(place - cut for place in places if cut <= place < cut + width)))
    return found[0] if len(found) == 1 else ()


def token_positions(tokens: Sequence[Sequence[tuple]], phrase: Sequence[int]) -> tuple[int, ...]:
    """Where the phrase's tokens are in the encoded text, at each time it occurs.

    tokens: chunks of (id, weight, word), word 0 for start, end and padding; the chunks are encoded side by side.
    """
    placed, start = [], 0
    for chunk in tokens:
        placed += [(start + i, entry[0]) for i, entry in enumerate(chunk) if _is_word(entry)]
        start += len(chunk)
    # An embedding's tokens are tensors, which are not part of a phrase.
    ids = [token if isinstance(token, int) else -1 for _, token in placed]
    positions: list[int] = []
    for i in range(len(ids) - len(phrase) + 1):
        if phrase and ids[i : i + len(phrase)] == list(phrase):
            positions += [placed[j][0] for j in range(i, i + len(phrase))]
    return tuple(dict.fromkeys(positions))


def tagged_positions(conditioning: list) -> tuple[int, ...]:
    """The subject's token positions in the first entry of a CONDITIONING that is tagged, or none."""
    return next((options[SUBJECT_TOKENS] for _, options in conditioning if options.get(SUBJECT_TOKENS)), ())


def require_subject(conditioning: list, name: str) -> None:
    """Raises ValueError, naming the input, where no entry of the CONDITIONING is tagged."""
    if not tagged_positions(conditioning):
        raise ValueError(
            f"{name} does not say where the subject is named: connect Encode Identity to `{name}`, with "
            f"{SUBJECT} in its text"
        )


def positions_by_entry(conditions: Mapping[str, list]) -> dict[Any, tuple[tuple[int, ...], int]]:
    """For each tagged entry, by ComfyUI's id of it: the subject's token positions, and the number of its tokens.

    `conditions` are a running guider's; the negative names what is not wanted, and is left out.
    """
    return {
        entry["uuid"]: (tuple(entry[SUBJECT_TOKENS]), entry["cross_attn"].shape[1])
        for kind, entries in conditions.items() if kind != "negative"
        for entry in entries or () if entry.get(SUBJECT_TOKENS)
    }


def warnings(clip: Any, subject: Subject) -> list[str]:
    """What the text encoder makes of the subject's words and the user does not mean: unknown words, a split token."""
    tokenizers = [part.tokenizer for part in vars(clip.tokenizer).values() if hasattr(part, "tokenizer")]
    unknown = {getattr(tokenizer, "unk_token_id", None) for tokenizer in tokenizers} - {None}
    lines = [
        f"the text encoder does not know the word {word!r}: choose one that it knows"
        for word in subject.trigger.split()
        if unknown.intersection(_own_ids(clip, word))
    ]
    count = len(_own_ids(clip, subject.token))
    if count > 1:
        lines.append(
            f"identity_token {subject.token!r} is {count} tokens, which keep their own meanings: a rare word of one "
            "token, such as sks, is learned more reliably"
        )
    return lines


def _ids(tokens: Mapping[str, list], name: str | None = None) -> list:
    """The ids of a tokenized text, by that tokenizer or the first, without start, end and padding."""
    return [entry[0] for chunk in tokens[name or next(iter(tokens))] for entry in chunk if _is_word(entry)]


def _is_word(entry: tuple) -> bool:
    """Whether a token is of the text; where a tokenizer does not say, as LongCat-Image's, each one is."""
    return len(entry) < 3 or entry[2] != 0


def _own_ids(clip: Any, text: str, name: str | None = None) -> list:
    """The ids of a text without those of the template that the encoder puts it into."""
    ids, template = _ids(clip.tokenize(text, return_word_ids=True), name), _template(clip, name)
    start = len(os.path.commonprefix([ids, template]))
    end = len(os.path.commonprefix([ids[start:][::-1], template[start:][::-1]]))
    return ids[start : len(ids) - end]


def _empty(clip: Any) -> dict[str, list]:
    return clip.tokenize("", return_word_ids=True)


def _template(clip: Any, name: str | None = None) -> list:
    """The ids of what the encoder puts around every text: none for CLIP and T5."""
    return _ids(_empty(clip), name)


def check_side_by_side(tokens: Mapping[str, list]) -> None:
    """Raises ValueError for encoders that put the texts of several tokenizers one after the other."""
    if _joined(tokens):
        raise ValueError(
            f"this text encoder joins {', '.join(tokens)}, whose token positions are not known: use an SD, SDXL or "
            "Wan model"
        )


def _joined(tokens: Mapping[str, list]) -> bool:
    return len(tokens) > 1 and not tokens.keys() <= _SIDE_BY_SIDE
