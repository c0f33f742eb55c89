"""What a gallery shows first."""

import pytest
from launcher import gallery


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
