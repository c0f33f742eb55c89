"""The subject in a prompt: its words, and the positions of its tokens as ComfyUI's tokenizers count them."""

import functools
from types import SimpleNamespace

import pytest
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.flux import FluxTokenizer, KleinTokenizer
from comfy.text_encoders.longcat_image import LongCatImageTEModel, LongCatImageTokenizer
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
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
def clip_of(make, model=None, name=None):
    """A CLIP as far as its texts go: one number per token, cut as its model cuts them."""
    tokenizer = make()

    def encode(tokens):
        """Of each token its place among all of them."""
        count = sum(map(len, tokens[name or next(iter(tokens))]))
        out, extra = torch.arange(float(count)).view(1, -1, 1), {"attention_mask": torch.ones(1, count)}
        if model is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SD1ClipModel, "encode_token_weights", lambda _self, _tokens: (out, None, extra))
                out = model.encode_token_weights(object.__new__(model), tokens)[0]
        return [[out, {}]]

    return SimpleNamespace(
        tokenize=tokenizer.tokenize_with_weights, tokenizer=tokenizer, encode_from_tokens_scheduled=encode
    )


JOINT = {
    "t5xxl": (FluxTokenizer, None), "qwen25_7b": (QwenImageTokenizer, QwenImageTEModel),
    "qwen3_4b": (KleinTokenizer, None), "longcat": (LongCatImageTokenizer, LongCatImageTEModel),
}


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("text", ["a photo of {subject} jumping", "{subject}, jumping", "dogs\nand {subject}"])
def test_positions_behind_a_template_are_those_of_the_encoded_words(text, name):
    """The text is a message of a chat; a word there has other tokens after a space, and the encoder cuts off the
    template in part. Each number that is encoded says which token it was.
    """
    make, model = JOINT[name]
    name = "qwen25_7b" if name == "longcat" else name
    clip = clip_of(make, model, name)
    ((encoded, options),) = subject_tokens.encode(clip, CAT, text)
    chunk = [entry[0] for chunk in clip.tokenize(CAT.expand(text), return_word_ids=True)[name] for entry in chunk]
    ids = [chunk[int(encoded[0, position, 0])] for position in options[SUBJECT_TOKENS]]
    assert getattr(clip.tokenizer, name).tokenizer.decode(ids).strip() == CAT.trigger
    with pytest.raises(ValueError, match="text does not name the subject"):
        subject_tokens.encode(clip, CAT, "a photo of a cat")


def test_a_text_whose_encoder_cuts_off_what_is_not_known_has_no_positions():
    for make, width in ((QwenImageTokenizer, 3), (FluxTokenizer, 77 + 256)):  # SD 3 joins two texts so
        other = {"encode_from_tokens_scheduled": lambda _tokens, width=width: [[torch.zeros(1, width, 1), {}]]}
        clip = SimpleNamespace(**{**vars(clip_of(make)), **other})
        ((_, options),) = subject_tokens.encode(clip, CAT, "a photo of {subject} jumping")
        assert SUBJECT_TOKENS not in options
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
