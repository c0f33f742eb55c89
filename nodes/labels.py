"""Text in pictures that nodes draw: a font that has the letters, and lines cut to a width."""

import contextlib
import functools
import unicodedata

from PIL import Image, ImageDraw, ImageFont

# Fonts for scripts that PIL's own lacks, as Linux, macOS and Windows ship them.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc",
    "msgothic.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf",
)
_LATIN = 0x250  # the first code point after Latin letters
_NO_LETTER = "\uffff"


@functools.lru_cache(maxsize=32)
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """PIL's own, and those of the list that this computer has."""
    fonts = [ImageFont.load_default(size)]
    for name in _WIDE_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@functools.lru_cache(maxsize=4096)
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font draws a letter, and not the box of letters that it lacks."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, size: int = 12) -> None:
    """One line of text, at most `width` pixels wide, in black; letters that no font here has become `?`."""
    text = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    others = {letter for letter in text if ord(letter) >= _LATIN}
    fonts = _fonts(size)
    font = next((font for font in fonts if all(_has(font, letter) for letter in others)), fonts[0])
    line = "".join("?" if letter in others and not _has(font, letter) else letter for letter in text)
    while line and draw.textlength(line, font=font) > width:
        line = f"{line.rstrip('…')[:-1]}…" if len(line) > 1 else ""
    draw.text(place, line, fill="black", font=font)


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture, and what draws on it."""
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)
