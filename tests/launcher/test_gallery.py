"""What a gallery shows first."""

import pytest
from launcher import gallery, scripts, workflow_files
from PIL import Image
from support import frontend


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


SHOWN_HEIGHTS = """() => [...document.querySelectorAll('figure')].map(figure => {
    const image = figure.querySelector('img')
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight)
    return [figure.className, image.naturalHeight * scale]
})"""


@pytest.mark.parametrize("result", [(768, 768), (1184, 384), (300, 900)])
def test_the_page_shows_the_result_larger_than_its_inputs(result, tmp_path):
    """A strip of panels as well, each of which is an input or a result."""
    files = []
    for i, size in enumerate([(128, 128), (128, 96), result]):
        files.append((tmp_path / f"{i}.png", "caption"))
        Image.new("RGB", size, (40, 120, 80 * i)).save(files[-1][0])
    workflow = workflow_files.find(scripts.ROOT / "workflows", ["puppets-1a"])[0]
    entry = gallery.Entry(workflow, "done", files=files, main=files[-1][0])
    gallery.write_page([entry], tmp_path / "index.html", "a machine")
    with frontend.browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((tmp_path / "index.html").as_uri())
        (name, main), *others = page.evaluate(SHOWN_HEIGHTS)
    assert name == "main" and len(others) == 2
    assert all(main > 1.2 * height for _, height in others)
