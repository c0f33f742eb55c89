"""How the pictures of the experiments are chosen and put together."""

import sys

import numpy as np
import pytest
from experiments import panels, report, runs
from PIL import Image


def test_the_cases_nearest_the_median_are_shown_and_rows_of_one_are_taken_together():
    rows = [{"case": case, "error": error} for case, error in enumerate((9.0, 1.0, 5.0, 4.0, 6.0))]
    assert panels.middle(rows, "error") == [2]
    assert set(panels.middle(rows, "error", 3)) == {2, 3, 4}
    turned = [{"asked": asked, "right": right} for asked, right in
              (("a", 1), ("a", 0), ("b", 1), ("b", 1), ("c", 0), ("c", 0))]
    assert panels.middle(turned, "right", of="asked") == ["a"]


def test_a_grid_has_its_cells_where_they_belong_and_white_between():
    red, blue = np.full((2, 3, 3), (255, 0, 0), np.uint8), np.full((2, 3, 3), (0, 0, 255), np.uint8)
    sheet = panels.grid([[None, red], [blue]])
    assert sheet.shape == (2 * 2 + panels.GAP, 2 * 3 + panels.GAP, 3)
    assert (sheet[:2, -3:] == red).all() and (sheet[-2:, :3] == blue).all()
    assert (sheet[:2, : -3] == 255).all() and (sheet[-2:, 3:] == 255).all()


@pytest.mark.parametrize("count", [1, 4])
def test_one_picture_stands_and_several_move(tmp_path, count):
    frames = [np.full((16, 16, 3), 60 * i, np.uint8) for i in range(count)]
    panels.save(tmp_path / "x", frames)
    with Image.open(tmp_path / "x.webp") as image:
        assert getattr(image, "n_frames", 1) == count


def test_a_picture_keeps_within_its_bytes_or_says_that_it_does_not(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    monkeypatch.setattr(panels, "BUDGET", 30_000)
    panels.save(tmp_path / "x", [noise])
    assert (tmp_path / "x.webp").stat().st_size <= 30_000 and "more than" not in capsys.readouterr().out
    monkeypatch.setattr(panels, "BUDGET", 3_000)
    panels.save(tmp_path / "x", [noise])
    assert "more than 3000" in capsys.readouterr().out


def test_the_command_saves_what_a_script_draws_from_the_rows_of_its_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "STATE", tmp_path / "state")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    cell, seen = np.zeros((8, 8, 3), np.uint8), []

    class Bench:
        settings, batch = "settings", 2

        def __init__(self, *_given):
            pass

        def make(self, _arm, cases):
            return [{"case": case, "error": float(case)} for case in cases], {}

    def picture(bench, rows):
        seen.append((type(bench), panels.middle(rows("ours"), "error")))
        return [cell]

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        runs.main("", "x", {"ours": 1}, {"other": 2}, (5, 2), Bench, lambda _rows: {}, picture)

    for words, message in ((["--picture"], "no rows yet: run --arm"), (["--picture", "--development"], "test cases")):
        with pytest.raises(SystemExit):
            command(*words)
        assert message in capsys.readouterr().err
    command("--arm", "ours")
    assert not (tmp_path / "x.webp").exists()
    command("--picture")
    assert seen == [(Bench, [2])] and (tmp_path / "x.webp").exists()
