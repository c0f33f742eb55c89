"""What a gallery shows first."""

import pytest
from launcher import gallery
from PIL import Image


def file(node, name, kind="output"):
    return {"node_id": node, "filename": name, "type": kind}


VIDEO, PICTURES, PREVIEW = file("1", "a.mp4"), [file("2", "a.png"), file("2", "b.png")], file("3", "c.png", "temp")


@pytest.mark.parametrize(("files", "expected"), [
    ([VIDEO, *PICTURES], PICTURES[0]),
    ([*PICTURES, VIDEO], PICTURES[0]),  # ComfyUI may run either first
    ([*PICTURES, PREVIEW], PICTURES[0]),
    ([file("4", "early.png"), *PICTURES], PICTURES[0]),
    ([VIDEO, PREVIEW], VIDEO),
    ([PREVIEW], PREVIEW),
    ([], None),
])
def test_the_main_file_is_the_picture_saved_last_whatever_else_there_is(files, expected):
    assert gallery.main_file(files) is expected


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 6])
def test_a_template_s_picture_is_a_square_that_shows_every_panel(panels):
    """The template browser shows squares: a strip would be a thin line in one."""
    strip = Image.new("RGB", (panels * 64, 64))
    colours = [(40 * i + 20, 200, 40) for i in range(panels)]
    for i, colour in enumerate(colours):
        strip.paste(colour, (64 * i, 0, 64 * i + 64, 64))
    square = gallery.squared(strip, 128)
    assert square.size == (128, 128)
    shown = [colour for _, colour in square.getcolors(2**20)]
    assert set(colours) <= set(shown)
    covered = sum(count for count, colour in square.getcolors(2**20) if colour in colours)
    assert covered >= 128 * 128 // 3
