"""How the pictures of the experiments are chosen and put together."""

import numpy as np
import pytest
from experiments import pictures
from PIL import Image


def test_the_cases_nearest_the_median_are_shown_and_rows_of_one_are_taken_together():
    rows = [{"case": case, "error": error} for case, error in enumerate((9.0, 1.0, 5.0, 4.0, 6.0))]
    assert pictures.middle(rows, "error") == [2]
    assert set(pictures.middle(rows, "error", 3)) == {2, 3, 4}
    turned = [{"asked": asked, "right": right} for asked, right in
              (("a", 1), ("a", 0), ("b", 1), ("b", 1), ("c", 0), ("c", 0))]
    assert pictures.middle(turned, "right", of="asked") == ["a"]


def test_a_grid_has_its_cells_where_they_belong_and_white_between():
    red, blue = np.full((2, 3, 3), (255, 0, 0), np.uint8), np.full((2, 3, 3), (0, 0, 255), np.uint8)
    sheet = pictures.grid([[None, red], [blue]])
    assert sheet.shape == (2 * 2 + pictures.GAP, 2 * 3 + pictures.GAP, 3)
    assert (sheet[:2, -3:] == red).all() and (sheet[-2:, :3] == blue).all()
    assert (sheet[:2, : -3] == 255).all() and (sheet[-2:, 3:] == 255).all()


@pytest.mark.parametrize(("count", "name"), [(1, "x.jpg"), (4, "x.webp")])
def test_one_picture_is_a_jpeg_and_several_move(tmp_path, count, name):
    frames = [np.full((16, 16, 3), 60 * i, np.uint8) for i in range(count)]
    pictures.save(tmp_path / "x", frames)
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == count


def test_a_picture_keeps_within_its_bytes(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    monkeypatch.setattr(pictures, "BUDGET", 30_000)
    pictures.save(tmp_path / "x", [noise])
    assert (tmp_path / "x.jpg").stat().st_size <= 30_000
