"""Prompts with identifiers, apart because nodes and training both encode them through ComfyUI's text encoders.

A placeholder is tokenized as copies of one word that the prompt does not have. These tokens then become the
identifier's vectors, as embeddings do in ComfyUI: weights, lengths and padding stay as its tokenizers make them.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..inputs.words import replace_words, words_pattern
from ..subject_tokens import SUBJECT, Subject, check_side_by_side, tag_subject_tokens
from .method import ActionError, ActionIdentifier, placeholders

# What ComfyUI's tokenizers return: encoder -> sections of (token id or embedding, weight).
Tokens = dict[str, list[list[tuple[Any, float]]]]
# tokens[placeholder][encoder]: [L, n, D]
ByPlaceholder = Mapping[str, Mapping[str, torch.Tensor]]

# Single tokens of the tokenizers in use; the first that is one here and is not in the prompt is used.
_STAND_INS = ("sks", "zwx", "vkt", "xjq", "zebra", "violin", "copper", "garden")
# Where this is one token, it is that of every unknown word.
_NONSENSE = "xqzvkjwq"
# Prompts that go through the text encoder in one batch.
_BATCH_SIZE = 16


def expand_subject(text: str, subject: Subject | None) -> str:
    """`text` with {subject} as a subject's token and class noun. Raises ValueError where one is missing."""
    if SUBJECT not in text:
        return text
    if subject is None:
        raise ValueError(f"text contains {SUBJECT}: connect `identity`, or write the subject in words")
    return replace_words(text, [SUBJECT], lambda _subject: subject.trigger)


def check_prompt(text: str, actions: Sequence[ActionIdentifier]) -> None:
    """Raises ValueError where a placeholder is missing from the text, or two identifiers share one."""
    seen: set[str] = set()
    for action in actions:
        if action.placeholder in seen:
            raise ValueError(
                f"two actions have the placeholder {action.placeholder}: give one of them another with `placeholder` "
                "of Load Action Identifier"
            )
        seen.add(action.placeholder)
        if not contains(text, action.placeholder):
            raise ValueError(
                f"text does not contain {action.placeholder}: write it where the action belongs, such as "
                f'"a cat {action.placeholder} on a beach"'
            )


def contains(text: str, placeholder: str) -> bool:
    """Whether the text holds the placeholder as a word: `wave` is not in `microwave`."""
    return bool(words_pattern([placeholder]).search(text))


def in_words(text: str, words: Mapping[str, str]) -> str:
    """The text with words[placeholder] for each placeholder."""
    return replace_words(text, words, words.__getitem__)


def plain_text(text: str, actions: Sequence[ActionIdentifier]) -> str:
    """The text with each placeholder as its initial word: what it means at strength 0."""
    return in_words(text, {action.placeholder: action.initial_word for action in actions})


def word_ids(tokenize: Callable[[str], Tokens], word: str) -> dict[str, list[int]]:
    """The token ids of a word or two in each encoder, without what marks start, end and padding."""
    special = {name: {token for token, _ in sections[0]} for name, sections in tokenize("").items()}
    return {
        name: [token for section in sections for token, _ in section
               if isinstance(token, numbers.Integral) and token not in special[name]]
        for name, sections in tokenize(word).items()
    }


def unknown_words(tokenize: Callable[[str], Tokens], text: str) -> list[str]:
    """The words of the text that an encoder splits into pieces, or reads as its one token for unknown words."""
    nonsense = word_ids(tokenize, _NONSENSE)

    def known(word: str) -> bool:
        return all(len(ids) == 1 and ids != nonsense[name] for name, ids in word_ids(tokenize, word).items())

    return [word for word in text.split() if not known(word)]


class _Mark(NamedTuple):
    """Holds the place of one of a placeholder's tokens among those of a prompt."""

    placeholder: str
    index: int


class OffsetPlace(NamedTuple):
    """One of a placeholder's tokens in an encoded prompt: its position there, its number among the placeholder's, and
    its weight.
    """

    position: int
    index: int
    weight: float


class Prompt:
    """A tokenized text whose placeholders take vectors of any value, as many as the tokens that it is made with.

    tokens[placeholder][encoder]: [L, n, D]. Raises ValueError where no word is free to mark them.
    """

    def __init__(self, tokenize: Callable[[str], Tokens], text: str, tokens: ByPlaceholder):
        counts = token_counts(tokens)
        order = [match[0] for match in words_pattern(counts).finditer(text)]
        self.marked: Tokens = {}
        for encoder in next(iter(counts.values())):
            marks = iter([_Mark(name, i) for name in order for i in range(counts[name][encoder])])
            _, marked, word_id = _marked(tokenize, text, encoder, counts)
            self.marked[encoder] = [
                [(next(marks) if _is(token, word_id) else token, weight) for token, weight in section]
                for section in marked[encoder]
            ]

    def places(self, placeholder: str) -> list[OffsetPlace]:
        """Those of the placeholder, in order. Raises ValueError for encoders that join their texts end to end."""
        check_side_by_side(self.marked)
        flat = [entry for section in next(iter(self.marked.values())) for entry in section]
        return [
            OffsetPlace(position, token.index, weight) for position, (token, weight) in enumerate(flat)
            if isinstance(token, _Mark) and token.placeholder == placeholder
        ]

    def at_layer(self, tokens: ByPlaceholder, layer: int) -> Tokens:
        """ComfyUI's tokens with those of one layer in their places; where L is 1, all layers have the same."""

        def vector(encoder: str, mark: _Mark) -> torch.Tensor:
            layers = tokens[mark.placeholder][encoder]
            return layers[min(layer, len(layers) - 1), mark.index]

        return {
            encoder: [
                [(vector(encoder, token) if isinstance(token, _Mark) else token, weight) for token, weight in section]
                for section in sections
            ]
            for encoder, sections in self.marked.items()
        }


def _is(token: Any, mark: int) -> bool:
    # The user's embeddings are among the ids as tensors.
    return isinstance(token, numbers.Integral) and token == mark


def _marked(tokenize, text: str, encoder: str, counts) -> tuple[str, Tokens, int]:
    """The text with one word in place of each of an identifier's tokens, that text tokenized, and the word's id."""
    pattern = words_pattern(counts)
    in_text = {token for section in tokenize(pattern.sub(" ", text))[encoder] for token, _ in section}
    for word in _STAND_INS:
        ids = word_ids(tokenize, word)[encoder]
        if len(ids) != 1 or ids[0] in in_text:
            continue
        written = pattern.sub(lambda match: f" {' '.join([word] * counts[match[0]][encoder])} ", text)
        marked = tokenize(written)
        occurrences = sum(_is(token, ids[0]) for section in marked[encoder] for token, _ in section)
        if occurrences == sum(counts[match[0]][encoder] for match in pattern.finditer(text)):
            return written, marked, ids[0]
    raise ValueError(
        "no word is free to mark the action while `text` is tokenized: remove one of these from it: "
        f"{', '.join(_STAND_INS)}"
    )


def tag_subject(
    conditioning: list, clip: Any, text: str, actions: Sequence[ActionIdentifier], subject: Subject
) -> list:
    """The CONDITIONING of `encode`, tagged with the positions of the subject's tokens as its layers read them.

    They differ from those of the plain prompt where an action takes more or fewer tokens than its initial word.
    Raises ValueError as Encode Identity does.
    """
    widths = encoder_widths(clip)
    counts = token_counts({action.placeholder: action.for_encoders(widths) for action in actions})
    written, _, _ = _marked(clip.tokenize, text, next(iter(widths)), counts)
    return tag_subject_tokens(conditioning, clip, subject, written)


def encode_each(encode: Callable[[Tokens], Sequence[torch.Tensor]], prompts: Sequence[Tokens]) -> list[torch.Tensor]:
    """Each of N prompts of one length encoded: a tensor [N, T, C] for each that `encode` gives.

    encode(tokens) gives tensors [1, T, C], their sections joined along T.
    """
    sizes = {len(sections) for tokens in prompts for sections in tokens.values()}
    # One batch as further sections of one prompt; only where all encoders have equally many of them.
    size = _BATCH_SIZE if len(sizes) == 1 else 1
    parts = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        joined = {name: [section for tokens in batch for section in tokens[name]] for name in batch[0]}
        parts.append([torch.cat(encoded.chunk(len(batch), dim=1)) for encoded in encode(joined)])
    return [torch.cat(encoded) for encoded in zip(*parts, strict=True)]


def encode(clip: Any, text: str, actions: Sequence[ActionIdentifier]) -> tuple[list, list[torch.Tensor]]:
    """The CONDITIONING of the text with its initial words, and for each of its entries the contexts [L, T, C].

    Raises ValueError where text, identifiers and clip do not fit together.
    """
    check_prompt(text, actions)
    widths = encoder_widths(clip)
    tokens = {action.placeholder: action.for_encoders(widths) for action in actions}
    # A clip with scheduled LoRAs gives several entries.
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(plain_text(text, actions)), show_pbar=False)
    prompt = Prompt(clip.tokenize, text, tokens)
    layers = common_layers(actions)
    if all(action.offsets is not None and _same_everywhere(action) for action in actions):
        layers = 1  # as trained, these tokens are the initial word's in every layer
    prompts = [prompt.at_layer(tokens, layer) for layer in range(layers)]

    def entries(joined: Tokens) -> list[torch.Tensor]:
        return [entry[0] for entry in clip.encode_from_tokens_scheduled(joined, show_pbar=False)]

    contexts = encode_each(entries, prompts)
    for action in actions:
        if action.offsets is not None:
            places = prompt.places(action.placeholder)
            contexts = [with_offsets(each, places, action.placeholder, action.offsets) for each in contexts]
    return plain, contexts


def _same_everywhere(action: ActionIdentifier) -> bool:
    return all(torch.equal(tokens, tokens[:1].expand_as(tokens)) for tokens in action.tokens.values())


def with_offsets(
    contexts: torch.Tensor, places: Sequence[OffsetPlace], placeholder: str, offsets: torch.Tensor
) -> torch.Tensor:
    """Contexts [L or 1, T, C] with a placeholder's offsets [L or 1, n, C], times their weights, at its places.

    Raises ActionError where their widths differ, ValueError for a place behind the encoded tokens.
    """
    if contexts.shape[2] != offsets.shape[2]:
        raise ActionError(
            f"the offsets of {placeholder} are {offsets.shape[2]} wide, and the encoded prompt {contexts.shape[2]}: "
            "connect the clip of the model that it was trained with"
        )
    if places[-1].position >= contexts.shape[1]:
        raise ValueError(
            f"the text is longer than the {contexts.shape[1]} tokens that are encoded: name {placeholder} earlier"
        )
    weights = torch.tensor([place.weight for place in places]).to(contexts)[:, None]
    added = offsets.to(contexts)[:, [place.index for place in places]] * weights
    where = torch.tensor([place.position for place in places], device=contexts.device)
    count = max(len(contexts), len(offsets))
    return contexts.expand(count, -1, -1).index_add(1, where, added.expand(count, -1, -1))


def token_counts(tokens: ByPlaceholder) -> dict[str, dict[str, int]]:
    """How many tokens each placeholder takes in each encoder."""
    return {
        name: {encoder: vectors.shape[1] for encoder, vectors in by_encoder.items()}
        for name, by_encoder in tokens.items()
    }


def common_layers(actions: Sequence[ActionIdentifier]) -> int:
    """How many contexts these identifiers need. Raises ActionError for identifiers of different models."""
    places = {action.places for action in actions if action.places}
    if len(places) > 1:
        names = placeholders([action for action in actions if action.places])
        raise ActionError(f"{names} were trained for different models: use identifiers of one kind of model")
    return max(len(next(iter(places), ())), 1)


def word_vectors(clip: Any, word: str) -> dict[str, torch.Tensor]:
    """The text encoders' own embeddings of a word, [n, D] each, fp32 on the CPU. Raises ValueError where an encoder
    has no token for it.
    """
    vectors = {}
    for name, ids in word_ids(clip.tokenize, word).items():
        if not ids:
            raise ValueError(f"the text encoder has no token for {word!r}: give another initial_word, say dancing")
        embedding = encoder_of(clip, name).transformer.get_input_embeddings()
        values = embedding(torch.tensor(ids, device=embedding.weight.device), out_dtype=torch.float32)
        vectors[name] = values.detach().cpu().clone()
    return vectors


def encoder_widths(clip: Any) -> dict[str, int]:
    """The width of each text encoder's token embeddings, by the name under which ComfyUI tokenizes for it."""
    return {
        name: encoder_of(clip, name).transformer.get_input_embeddings().weight.shape[1] for name in clip.tokenize("")
    }


def encoder_of(clip: Any, name: str) -> Any:
    """ComfyUI's text encoder module for tokens under `name`. Raises ValueError for an unknown one."""
    stage = clip.cond_stage_model
    encoder = getattr(stage, f"clip_{name}", None) or getattr(stage, name, None)
    if encoder is None:
        raise ValueError(f"clip has an unknown text encoder, {name}: connect that of an SD, SDXL or Wan model")
    return encoder
