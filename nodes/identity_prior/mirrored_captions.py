"""Captions of mirror images; apart, since they are about language alone: what is a side, and what only sounds so."""

import re

_WORD = r"[^\W\d_]+"
_ENGLISH = re.compile(r"(?<![A-Za-z0-9_])(?:left|right)(?=(?:most|ward|wards)?(?![A-Za-z0-9_]))", re.IGNORECASE)
# After these "right" is a side whatever comes next: "on the right behind it", "the far right".
_PLACES = frozenset(
    "the a its his her their my your our whose far top bottom upper lower front back rear middle centre center "
    "extreme outer inner near facing to from towards toward left and or".split()
)
# "right" after these, or before those, is no side: "all right", "right now", "right behind it", "the right size".
_RIGHT_AFTER = frozenset("all just exactly quite perfectly alright that's you're serves".split())
_RIGHT_BEFORE = frozenset(
    "now away next behind beside before after above below beneath under over there here through into onto at in on "
    "up down out across against along around by beyond past off between inside outside underneath opposite when "
    "where as".split()
)
_RIGHT_NOUNS = frozenset(
    "angle angles angled way thing time moment size answer amount choice person word words".split()
)
# "left" after these, or before those, is what someone did or what remains: "has left", "nothing left", "left behind".
_LEFT_AFTER = frozenset(
    "has have had having been he she they we who nothing anything something none little few only just".split()
)
_LEFT_BEFORE = frozenset("behind over alone out open untouched empty unattended unfinished him me us them".split())
# What these words of Japanese and Chinese mean has no side, or has both: "about", "fate", "motto", "plasterer".
_EAST_ASIAN = re.compile(
    "左右|右往左往|左顾右盼|左顧右盼|左思右想|左邻右舍|左鄰右舍|无出其右|無出其右|座右|左官|左遷|左迁|右に出る|"
    "左|右|ひだり|みぎ|ヒダリ|ミギ|(?:왼|오른)(?=쪽|손|발|팔|다리|편|눈|귀|뺨|어깨|무릎)"
)
_OTHER = {
    "left": "right", "左": "右", "ひだり": "みぎ", "ヒダリ": "ミギ", "왼": "오른",
}
_OTHER |= {there: here for here, there in _OTHER.items()}


def mirrored(text: str) -> str:
    """The text with left and right swapped where they are sides, in English, Japanese, Chinese and Korean."""

    def other(match: re.Match[str]) -> str:
        if not _is_side(match):
            return match[0]
        word = _OTHER[match[0].lower()]
        return word.upper() if match[0].isupper() else word.title() if match[0][0].isupper() else word

    text = _EAST_ASIAN.sub(lambda match: _OTHER.get(match[0], match[0]), text)
    return _ENGLISH.sub(other, text)


def _is_side(match: re.Match[str]) -> bool:
    """Whether an English "left" or "right" names a side, by the words around it."""
    # A comma ends what belongs together.
    before = re.search(r"([\w'’]+)\s+$", match.string[: match.start()])
    after = re.match(rf"[\s-]+({_WORD})", match.string[match.end() :])
    earlier = before[1].lower().replace("’", "'") if before else ""
    later = after[1].lower() if after else ""
    if match[0].lower() == "right":
        if later in _RIGHT_NOUNS:
            return False
        return earlier in _PLACES or not (earlier in _RIGHT_AFTER or later in _RIGHT_BEFORE)
    return later in ("of", "hand", "side") or not (earlier in _LEFT_AFTER or later in _LEFT_BEFORE)
