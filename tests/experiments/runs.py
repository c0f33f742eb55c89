"""One arm at a time: its rows are written as they come, and a run that was killed goes on where it stopped.

A script lists its arms as frozen dataclasses and hands `main` what makes a batch of cases:

    ARMS = {"prompt": Arm(), ...}
    runs.main(__doc__, "frequency_guidance", ARMS, DEVELOPMENT, (120, 12), Bench, tables)

`Bench(options, folder)` is made once an arm is to run, loads the models, and has

    settings: object      what else decides the pictures (sampling, the models' digests), by its repr
    batch: int            how many cases are made at once
    prepare(arm)          where there is one: trains beforehand, so that a case's seconds are its own
    make(arm, cases)      (rows, pictures): a row at least for each case, with "case"; pictures by name, uint8

Of every script:

    --arm NAME [NAME ...]     rows to .cache/experiments/METHOD/test; all: every arm; "rank *": those
    --report                  rows to results/METHOD.csv.gz, tables and claims to results/METHOD.json; arms that were
                              not made here keep the rows that lie there, if they were of the same settings
    --picture                 results/METHOD.webp, of the cases at the median
    --development --arm ...   development arms, or those of the test, on development cases: printed alone
    --cases N                 the first N cases, without --report
"""

import argparse
import csv
import fnmatch
import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from launcher import scripts
from PIL import Image

from . import panels, report, sampling

STATE = scripts.ROOT / ".cache" / "experiments"


def number(text: str) -> float | str:
    """What a cell of a CSV holds."""
    try:
        return float(text)
    except ValueError:
        return text


def read_rows(path: Path) -> list[dict]:
    """Rows as `report.write_csv` wrote them; none where there is no file."""
    if not path.exists():
        return []
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as file:
        return [{k: number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def slug(name: str) -> str:
    """A file's name of an arm's."""
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)


class Rows:
    """The rows and pictures of an arm; those of other settings lie in another folder."""

    def __init__(self, folder: Path, arm: str, settings: object):
        self.arm, self.folder = arm, folder / f"{slug(arm)}_{report.fingerprint(settings)}"
        self.path = self.folder / "rows.csv"
        self.found = read_rows(self.path)
        if self.found:
            self._report_these()

    def left(self, cases: Sequence[int]) -> list[int]:
        """The cases that have no row yet."""
        there = {int(row["case"]) for row in self.found}
        return [case for case in cases if case not in there]

    def add(self, rows: Sequence[dict], pictures: dict[str, np.ndarray]) -> None:
        """Pictures first: a case that has a row has its pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            Image.fromarray(picture).save(self.folder / f"{name}.png")
        self.found += [{"arm": self.arm, **row} for row in rows]
        report.write_csv(self.path, self.found)
        self._report_these()

    def _report_these(self) -> None:
        """Of an arm's settings those that were asked for last are reported, also where nothing was left to make."""
        report.replace(self.folder.parent / f"{slug(self.arm)}.newest", self.folder.name.encode())


def newest(folder: Path, arm: str) -> list[dict]:
    """The arm's rows by the settings that ran last."""
    pointer = folder / f"{slug(arm)}.newest"
    return read_rows(folder / pointer.read_text() / "rows.csv") if pointer.exists() else []


class Reported:
    """The rows of a method in a folder of results, which outlive the machine that made them.

    settings: of each arm all that decides its pictures; rows of others are not its rows.
    """

    def __init__(self, results: Path, name: str, settings: dict[str, object]):
        self.rows_path, self.tables_path = results / f"{name}.csv.gz", results / f"{name}.json"
        self.settings = {arm: report.fingerprint(setting) for arm, setting in settings.items()}

    def rows(self, arm: str) -> list[dict]:
        """Those that lie there of an arm."""
        made_by = json.loads(self.tables_path.read_text()).get("settings", {}) if self.tables_path.exists() else {}
        if made_by.get(arm) != self.settings[arm]:
            return []
        return [row for row in read_rows(self.rows_path) if row["arm"] == arm]

    def write(self, rows: list[dict], tables: dict) -> None:
        settings = {arm: self.settings[arm] for arm in dict.fromkeys(row["arm"] for row in rows)}
        report.write_csv(self.rows_path, rows)
        report.write_json(self.tables_path, {"machine": report.machine(), **tables, "settings": settings})


def fuller(here: list[dict], there: list[dict]) -> list[dict]:
    """The rows of more cases: those of this machine, unless a killed run left fewer of them."""
    return here if len({row["case"] for row in here}) >= len({row["case"] for row in there}) else there


def sheet(folder: Path, arms: Sequence[str], most: int = 12) -> None:
    """The first pictures of every arm, to look at: sheet.jpg beside the rows, not among the results."""
    rows = []
    for arm in arms:
        paths = sorted((folder / (folder / f"{slug(arm)}.newest").read_text()).glob("*.png"), key=_by_numbers)[:most]
        if paths:
            rows.append((arm, np.stack([np.asarray(Image.open(path)) for path in paths])))
    if rows:
        report.contact_sheet(folder / "sheet.jpg", rows, budget=4_000_000)
        print(f"to look at: {folder / 'sheet.jpg'}")


def _by_numbers(path: Path) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in path.stem.split("_")]


def run(kept: Rows, cases: Sequence[int], batch: int, make: Callable) -> None:
    """Makes what is left of the cases; each row gets the CPU seconds of its share, all threads together."""
    left = kept.left(cases)
    for start in range(0, len(left), batch):
        some = left[start : start + batch]
        before, by_clock = time.process_time(), time.monotonic()
        rows, pictures = make(some)
        spent, by_clock = time.process_time() - before, time.monotonic() - by_clock
        kept.add([{**row, "seconds": spent / max(len(rows), 1)} for row in rows], pictures)
        print(f"{kept.arm}: {len(kept.left(cases))} left, {spent / len(some):.1f} CPU seconds a case "
              f"({by_clock / len(some):.1f} by the clock)", flush=True)


def main(
    doc: str, name: str, arms: dict, development: dict, counts: tuple[int, int], bench: Callable,
    tables: Callable[[list[dict]], dict], picture: panels.Picture | None = None,
) -> None:
    """The command line of a script. counts: test and development cases; tables(rows) is what --report writes,
    picture(bench, rows) what --picture does.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", default=[], help=f"all, or patterns of names: {'; '.join(arms)}. For "
                        f"development: {'; '.join(development)}")
    parser.add_argument("--development", action="store_true", help="development cases and arms")
    parser.add_argument("--cases", type=int, help="the first so many; by default as the protocol says")
    parser.add_argument("--checkpoint", type=Path, default=sampling.CHECKPOINT)
    parser.add_argument("--report", action="store_true", help="write what there is to results")
    if picture:
        parser.add_argument("--picture", action="store_true", help="one for readers, of the cases at the median")
    options = parser.parse_args()
    drawing = picture and options.picture
    if options.report and options.cases:
        parser.error("--report is of all cases: leave out --cases")
    if drawing and options.development:
        parser.error("--picture is of test cases: leave out --development")
    known = development | arms if options.development else arms
    asked = list(development if options.development else arms)
    if options.arm != ["all"]:
        found = [(wanted, fnmatch.filter(known, wanted)) for wanted in options.arm]
        if unknown := [wanted for wanted, names in found if not names]:
            parser.error(f"there is no arm {unknown[0]!r}: choose of {'; '.join(known)}")
        asked = [name for _, names in found for name in names]
    folder = STATE / name / ("development" if options.development else "test")
    count = options.cases or counts[options.development]
    stage = bench(options, folder) if asked or drawing or options.report else None
    for arm in asked:
        kept = Rows(folder, arm, (known[arm], stage.settings))
        if hasattr(stage, "prepare") and kept.left(range(count)):
            stage.prepare(known[arm])
        run(kept, range(count), stage.batch, lambda some, arm=arm: stage.make(known[arm], some))
    settings = {arm: (known[arm], stage.settings) for arm in known} if stage else {}
    kept_there = Reported(report.RESULTS, name, settings)

    def found_of(arm: str) -> list[dict]:
        if options.development:
            return newest(folder, arm)
        return fuller(Rows(folder, arm, settings[arm]).found, kept_there.rows(arm))

    if drawing:
        def rows_of(arm: str) -> list[dict]:
            return found_of(arm) or parser.error(f'there are no rows yet: run --arm "{arm}" first')

        panels.save(report.RESULTS / name, picture(stage, rows_of))
    if not (options.report or options.development):
        return
    rows = [row for arm in known for row in found_of(arm) if row["case"] < count]
    if not rows:
        parser.error("there are no rows yet: run arms first")
    sheet(folder, [arm for arm in known if newest(folder, arm)])
    found = tables(rows)
    print(report.text(found))
    if not options.development:
        kept_there.write(rows, found)
