"""Words and lists in text of any script: where a word begins, what separates entries; without ComfyUI."""

import re
from collections.abc import Callable, Iterable

# Scripts that write no spaces between words, or join particles to them: Thai to Myanmar, Hangul, Khmer, and all of
# Chinese and Japanese.
_UNSPACED = (
    "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3031-\u318f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# A letter or digit of a script with spaces; combining marks of other letters than the unspaced ones go with them.
_SPACED = rf"(?:(?![{_UNSPACED}])[\w\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u064b-\u065f\u0900-\u0963])"
# Commas and semicolons of any script, and the ends of lines.
SEPARATORS = re.compile("[,\uff0c\u3001\uff64\u060c;\uff1b\n]")
# A range's dash: hyphens, dashes and minus signs of any width, and the tildes that Japanese and Chinese write.
DASH = "[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d~\u301c\uff5e]"


def words_pattern(words: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """Finds these words, longer ones first, but not as parts of longer words; in a script without spaces, or beside
    one, a word may stand anywhere.
    """
    return re.compile("|".join(
        rf"(?<!{_SPACED})" * _is_spaced(word[0]) + re.escape(word) + rf"(?!{_SPACED})" * _is_spaced(word[-1])
        for word in sorted(words, key=len, reverse=True)
    ), flags)


def replace_words(text: str, words: Iterable[str], replacement: Callable[[str], str], flags: int = 0) -> str:
    """`text` with replacement(word) for each of `words`, as `words_pattern` finds them. A space is put between it and
    a script without spaces, of which tokenizers would take it for a part.
    """

    def separated(match: re.Match[str]) -> str:
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return " " * _is_unspaced(before) + replacement(match[0]) + " " * _is_unspaced(after)

    return words_pattern(words, flags).sub(separated, text)


def entries(text: str) -> list[str]:
    """The entries of a list in words, without the empty ones."""
    return [entry.strip() for entry in SEPARATORS.split(text) if entry.strip()]


def _is_spaced(character: str) -> bool:
    return bool(re.fullmatch(_SPACED, character))


def _is_unspaced(character: str) -> bool:
    return bool(re.fullmatch(f"[{_UNSPACED}]", character))
