"""Which files of a folder count, and the contact sheet of them."""

import av
import numpy as np
import pytest
from pack.nodes import labels
from pack.nodes.casting import folder, method
from PIL import Image, ImageDraw

EVERY = method.items(["anna\nbert"], ["waving\nsitting"], ["on a beach"], ["0"], "{identity} {action}", "sheet")
COLOURS = ("red", "green", "blue", "white")


def save_video(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), (0, 0, 255), np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def save(path, colour="red"):
    save_video(path) if path.suffix == ".mp4" else Image.new("RGB", (40, 30), colour).save(path)
    return path


@pytest.fixture
def casting(output):
    made = output / "casting"
    made.mkdir()
    return made


@pytest.mark.parametrize("ending", ["_00001_.png", ".png", "_00001_.jpg", "_00012_.webp", ".gif", "_00001_.mp4"])
def test_a_file_counts_once_it_is_whole(casting, ending):
    path = save(casting / (EVERY[0].stem + ending))
    files, damaged = folder.present("casting/")
    assert files == {EVERY[0].stem: path} and not damaged
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:-3], content[:6], content[:2], b""):
        path.write_bytes(part)
        assert folder.present("casting/") == ({}, 1), len(part)


def test_other_files_do_not_count(casting):
    for name in ("sheet_contact_sheet.jpg", "photo.png", f"{EVERY[0].stem}_00001_.txt", "x_zzzzzz.png"):
        (casting / name).write_bytes(b"x")
    assert folder.present("casting/") == ({}, 0) == folder.present("elsewhere/")


def test_the_newest_number_is_shown_and_a_rewritten_file_is_read_again(casting):
    for number, colour in ((1, "red"), (2, "blue")):
        save(casting / f"{EVERY[0].stem}_{number:05}_.png", colour)
    files, _ = folder.present("casting/")
    assert files[EVERY[0].stem].name.endswith("_00002_.png")


@pytest.mark.parametrize(("prefix", "parts"), [
    ("casting/sheet", ("casting/", "sheet")), ("a", ("", "a")), ("a\\b%day%/c%year%", ("a/b_day_/", "c_year_")),
])
def test_the_prefix_is_a_folder_and_a_beginning(prefix, parts):
    assert folder.split_prefix(prefix) == parts


@pytest.mark.parametrize("prefix", ["../x", "/x", "x" * 31, ""])
def test_bad_prefixes_are_refused(prefix):
    with pytest.raises(ValueError):
        folder.split_prefix(prefix)


def test_the_contact_sheet_has_each_picture_at_its_place(casting):
    for item, colour in zip(EVERY[:3], COLOURS, strict=False):
        save(casting / f"{item.stem}_00001_.png", colour)
    sheet = folder.contact_sheet(EVERY, folder.present("casting/")[0])
    assert sheet.size == (220 + 2 * 96, 16 + 2 * 96)
    centres = [sheet.getpixel((220 + 48 + 96 * column, 16 + 48 + 96 * row)) for row in (0, 1) for column in (0, 1)]
    assert centres == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (221, 221, 221)], "the last is not there"
    labelled = np.asarray(sheet)[:, :220]
    assert (labelled[20:60] < 128).any() and (labelled[116:156] < 128).any(), "both rows have a label"
    assert folder.write_contact_sheet("casting/", "sheet", EVERY, {}) == "sheet_contact_sheet.jpg"
    assert [path.name for path in casting.iterdir() if path.suffix in (".jpg", ".tmp")] == ["sheet_contact_sheet.jpg"]


def test_a_video_shows_its_first_frame_and_a_damaged_picture_none(casting):
    save(casting / f"{EVERY[0].stem}_00001_.mp4")
    broken = casting / f"{EVERY[1].stem}_00001_.png"
    broken.write_bytes(b"no picture" + folder._PNG_END)
    sheet = folder.contact_sheet(EVERY, folder.present("casting/")[0])
    red, _, blue = sheet.getpixel((268, 64))
    assert blue > 150 and red < 100
    assert sheet.getpixel((364, 64)) == (221, 221, 221)


def test_a_large_sheet_stays_a_picture():
    many = method.items(
        [f"p{i}" for i in range(40)], [f"a{i}" for i in range(25)], [""], ["0-9"], "{identity}{action}", "s"
    )
    assert max(folder.contact_sheet(many, {}).size) <= 24 * 400 + 16


def test_letters_that_no_font_has_are_question_marks(monkeypatch):
    drawn = {}
    for fonts in ((), labels._WIDE_FONTS):
        monkeypatch.setattr(labels, "_WIDE_FONTS", fonts)
        labels._fonts.cache_clear()
        for text in ("人", "?", "é"):
            image, draw = labels.canvas(40, 20)
            labels.draw_text(draw, (2, 1), text, 36)
            drawn[text, bool(fonts)] = image.tobytes()
    labels._fonts.cache_clear()
    assert drawn["人", False] == drawn["?", False] != drawn["é", False]
    no_box, draw = labels.canvas(40, 20)
    draw.text((2, 1), "人", fill="black", font=labels.ImageFont.load_default(12))
    assert drawn["人", True] != no_box.tobytes(), "a letter or a question mark, and no box"


@pytest.mark.parametrize("text", ["plain", "ゆっくり歩く人形", "x" * 300, "", "👩‍🚀 in space", "\x00\n"])
def test_labels_take_any_text_and_stay_in_their_width(text):
    image, draw = labels.canvas(200, 20)
    assert isinstance(draw, ImageDraw.ImageDraw)
    labels.draw_text(draw, (2, 1), text, 100)
    assert (np.asarray(image)[:, 104:] == 255).all()
