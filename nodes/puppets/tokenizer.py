"""Word-level tokenizer of the puppet theatre: one token a word, over the renderer's closed vocabulary."""

import functools

from .captions import VOCABULARY

PAD, START, END, UNKNOWN = "[pad]", "[start]", "[end]", "[unknown]"
# Words without a meaning in the theatre: names for subjects and actions that a user teaches it.
FREE_WORDS = ("sks", "ohwx", "zwx", "olis", "mhj", "vkt", "xjq", "tpn")
# Ids are positions: append only, or shipped checkpoints change their meaning.
WORDS = (PAD, START, END, UNKNOWN, *FREE_WORDS, *VOCABULARY)
MAX_TOKENS = 40


@functools.cache
def build() -> "PreTrainedTokenizerFast":  # noqa: F821
    """transformers' fast tokenizer: lower-cases, splits on spaces and commas, wraps in start and end tokens."""
    # Late, since ComfyUI starts faster without them.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(",", "removed"), pre_tokenizers.WhitespaceSplit(),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, WORDS.index(START)), (END, WORDS.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, bos_token=START, eos_token=END
    )
