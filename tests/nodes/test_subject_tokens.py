"""The subject in a prompt: its words, and the positions of its tokens as ComfyUI's tokenizers count them."""

import functools
from types import SimpleNamespace

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.flux import FluxTokenizer
from comfy.text_encoders.qwen_image import QwenImageTokenizer
from comfy.text_encoders.z_image import ZImageTokenizer
from hypothesis import given
from hypothesis import strategies as st
from pack.nodes import subject_tokens
from pack.nodes.subject_tokens import SUBJECT_TOKENS, Subject

CAT = Subject("sks", "tabby  cat")


def test_texts_name_the_subject_or_are_refused():
    assert CAT.trigger == "sks tabby cat"
    assert CAT.expand("a {subject}\n jumping") == "a sks tabby cat jumping"
    assert CAT.expand("A SKS tabby cat") == "A SKS tabby cat"
    assert CAT.as_class_prompt("a {subject} and sks tabby cat") == "a tabby cat and tabby cat"
    assert CAT.as_class_prompt("A SKS Tabby Cat, sks's tail, {subject}") == "A tabby cat, tabby cat's tail, tabby cat"
    assert CAT.expand("一只SKS tabby cat在跳，{subject}在跑") == "一只 SKS tabby cat 在跳，sks tabby cat 在跑"
    assert CAT.as_class_prompt("一只sks在跳，{subject}在跑") == "一只 tabby cat 在跳，tabby cat 在跑"
    for other in ("a cat jumping", "he asks tabby cat", "a sks tabby caterpillar", "two {subject}s"):
        with pytest.raises(ValueError, match="text does not name the subject.*Write {subject}"):
            CAT.expand(other)
    for token, noun in (("", "cat"), ("two words", "cat"), ("sks", " ")):
        with pytest.raises(ValueError, match="identity_token"):
            Subject(token, noun)


@pytest.mark.parametrize("make", [SD1Tokenizer, SDXLTokenizer])
@pytest.mark.parametrize(("text", "expected"), [
    ("sks tabby cat", [1, 2, 3, 4]),
    ("a photo of sks tabby cat, jumping", [4, 5, 6, 7]),
    ("a (sks tabby cat:1.3) here", [2, 3, 4, 5]),
    ("sks tabby cat and sks tabby cat", [1, 2, 3, 4, 6, 7, 8, 9]),
    (CAT.expand("一只{subject}在跳"), [5, 6, 7, 8]),
    ("word " * 74 + "sks tabby cat", [75, 78, 79, 80]),  # a text of two chunks
    ("a tabby cat", []),
])
def test_positions_are_those_of_the_subject_s_tokens(make, text, expected):
    """sks is two tokens, sk and s, of CLIP; the positions count start and end tokens, over chunks of 77."""
    tokenizer = make()
    tokens = tokenizer.tokenize_with_weights(text, return_word_ids=True)
    trigger = tokenizer.tokenize_with_weights(CAT.trigger, return_word_ids=True)
    actual = list(subject_tokens.subject_positions(tokens, trigger))
    flat = [entry[0] for chunk in tokens["l"] for entry in chunk]
    phrase = [entry[0] for chunk in trigger["l"] for entry in chunk if entry[2] != 0]
    assert [flat[i] for i in actual] == phrase * (len(actual) // len(phrase))
    assert len(actual) == len(phrase) * text.count("sks")
    if len(phrase) == len(expected):
        assert actual[0] >= 1


def test_joined_encoders_are_refused():
    with pytest.raises(ValueError, match="joins l, t5xxl"):
        subject_tokens.subject_positions({"l": [], "t5xxl": []}, {})


@functools.cache
def clip_of(make):
    """A CLIP as far as its texts go: one zero per token."""
    tokenizer = make()
    return SimpleNamespace(
        tokenize=tokenizer.tokenize_with_weights, tokenizer=tokenizer,
        encode_from_tokens_scheduled=lambda tokens: [[torch.zeros(1, len(next(iter(tokens.values()))[0]), 4), {}]],
    )


@pytest.mark.parametrize("make", [ZImageTokenizer, QwenImageTokenizer, FluxTokenizer])
def test_an_encoder_with_a_template_or_of_two_texts_names_the_subject_without_positions(make):
    """In Z-Image and Qwen-Image the text is a message of a chat; a word there has other tokens after a space."""
    clip = clip_of(make)
    ((_, options),) = subject_tokens.encode(clip, CAT, "a photo of {subject} jumping")
    assert SUBJECT_TOKENS not in options
    with pytest.raises(ValueError, match="text does not name the subject"):
        subject_tokens.encode(clip, CAT, "a photo of a cat")
    ((_, options),) = subject_tokens.encode(clip_of(SD1Tokenizer), CAT, "a photo of {subject} jumping")
    assert options[SUBJECT_TOKENS]


@pytest.mark.parametrize("make", [ZImageTokenizer, QwenImageTokenizer])
def test_a_template_is_not_counted_among_the_tokens_of_a_word(make):
    (line,) = subject_tokens.warnings(clip_of(make), CAT)
    assert "'sks' is 2 tokens" in line
    assert subject_tokens.warnings(clip_of(make), Subject("dog", "cat")) == []


def test_phrases_across_chunks_and_embeddings():
    chunks = [[(9, 1, 0), (1, 1, 1), (5, 1, 1), (9, 1, 0)], [(9, 1, 0), (6, 1, 1), (torch.ones(3), 1, 2)]]
    assert subject_tokens.token_positions(chunks, [5, 6]) == (2, 5)
    assert subject_tokens.token_positions(chunks, []) == () and subject_tokens.token_positions([], [1]) == ()


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=4), st.lists(st.integers(0, 3), max_size=3))
def test_token_positions_are_every_place_of_the_phrase(chunks, phrase):
    """Against a search through the joined tokens; 0 marks start, end and padding, which no phrase reaches over."""
    tokens = [[(token, 1.0, int(token != 0)) for token in chunk] for chunk in chunks]
    flat = [token for chunk in chunks for token in chunk]
    words = [(i, token) for i, token in enumerate(flat) if token != 0]
    expected = set()
    for start in range(len(words)):
        window = words[start : start + len(phrase)]
        if phrase and [token for _, token in window] == phrase:
            expected |= {i for i, _ in window}
    assert set(subject_tokens.token_positions(tokens, phrase)) == expected


def test_tags_are_read_from_the_first_entry_that_has_them():
    plain, tagged = [torch.zeros(1, 4, 8), {}], [torch.zeros(1, 4, 8), {SUBJECT_TOKENS: (2, 3)}]
    assert subject_tokens.tagged_positions([plain, tagged]) == (2, 3)
    assert subject_tokens.tagged_positions([plain]) == () and subject_tokens.tagged_positions([]) == ()
    with pytest.raises(ValueError, match="connect Encode Identity to `positive`"):
        subject_tokens.require_subject([plain], "positive")


def test_a_negative_that_names_the_subject_is_not_looked_at():
    def entry(uuid, positions=(1, 2)):
        return {"uuid": uuid, SUBJECT_TOKENS: positions, "cross_attn": torch.zeros(1, 4, 8)}

    conditions = {"positive": [entry("a"), entry("b", ())], "negative": [entry("c")], "middle": None}
    assert subject_tokens.positions_by_entry(conditions) == {"a": ((1, 2), 4)}


def test_the_key_in_conditionings_stays():
    """Digests of conditionings in checkpoints hold it."""
    assert SUBJECT_TOKENS == "understudy_subject_columns"
