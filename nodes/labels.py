"""Text in pictures that nodes draw: a font that has the letters, and lines cut to a width."""

import functools
import unicodedata

from PIL import Image, ImageDraw, ImageFont

# Fonts for scripts that PIL's own lacks, as Linux, macOS and Windows ship them.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc",
    "msgothic.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
)
_LATIN = 0x250  # the first code point after Latin letters


@functools.lru_cache(maxsize=32)
def _font(size: int, wide: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    if not wide:
        return ImageFont.load_default(size)
    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this computer
            continue
    return None


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, size: int = 12) -> None:
    """One line of text, at most `width` pixels wide, in black; letters that no font here has become `?`."""
    text = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    wide = any(ord(letter) >= _LATIN for letter in text)
    font = _font(size, wide)
    if font is None:
        text = "".join(letter if ord(letter) < _LATIN else "?" for letter in unicodedata.normalize("NFC", text))
        font = _font(size, False)
    line = text
    while line and draw.textlength(line, font=font) > width:
        line = f"{line.rstrip('…')[:-1]}…" if len(line) > 1 else ""
    draw.text(place, line, fill="black", font=font)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture, and what draws on it."""
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)
