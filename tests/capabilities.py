"""Writes the table of families in tests/README.md: what each node does with a tiny model of every one.

    python tests/capabilities.py              # what is missing; it can be stopped and started again
    python tests/capabilities.py --again      # all of it
    python tests/capabilities.py Flux Wan     # only families whose names begin so; writes no table

Ends with an error where a node neither works nor refuses in words.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "workflows")]

from launcher import scripts  # noqa: E402

STORED = _TESTS.parent / ".cache" / "capabilities.json"
README, FRONT = _TESTS / "README.md", _TESTS.parent / "README.md"
SENTENCE = re.compile(r"\[\d+ families\]\(tests/README.md#every-family\) of such models: of \d+ cells \d+ work")
HEADING = "## Every family\n"
_INTRODUCTION = """
Written by this command, which can be stopped and started again, and fails where a node does anything but work or refuse in words:

```
python tests/capabilities.py            # the families and nodes that are missing
python tests/capabilities.py --again    # all of them
```

Each is ComfyUI's own class with random weights and few, narrow layers; texts and latents are random, in the family's shapes. Found by *class* are those that ComfyUI's detection does not find at this size, since it takes a width for the sign of the family. + works, by the checks below the table. – is refused before sampling, in words that name the family and what to use instead. A few also run in the suite: `tests/nodes/test_families.py`. No real weights were run.
"""  # noqa: E501

_LEFT = "Not in the table, of what ComfyUI 0.30.0 detects, by its own names:"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("families", nargs="*", help="beginnings of names")
    arguments = parser.parse_args()
    scripts.alias_pack()
    base = Path(tempfile.mkdtemp(prefix="understudy-capabilities-"))
    scripts.add_comfy_path(base)
    logging.disable(logging.WARNING)
    found = {} if arguments.again or not STORED.exists() else json.loads(STORED.read_text(encoding="utf-8"))
    failed = _run(found, tuple(arguments.families))
    if not failed and not arguments.families:
        write(found)
    return 1 if failed else 0


def _run(found: dict, beginnings: tuple[str, ...]) -> int:
    """Fill `found`, {family: {"by": how, column: [outcome, how]}}; how many cells failed."""
    from support import capability_checks, family_models, family_relatives

    failed = 0
    for family in family_relatives.EVERY:
        if beginnings and not family.name.startswith(beginnings):
            continue
        cells = found.setdefault(family.name, {})
        missing = [name for name in capability_checks.CHECKS if name not in cells]
        if not missing:
            continue
        case = capability_checks.Case(family, family_models.build(family))
        cells["by"] = "detection" if family_models.detected(case.model, family) else "class"
        for name in missing:
            try:
                cells[name] = capability_checks.outcome(case, name)
            except Exception as error:  # noqa: BLE001 - the others go on, and the command ends with an error
                failed += 1
                _say(f"FAILED {family.name}: {name}: {type(error).__name__}: {str(error)[:400]}")
                if beginnings:
                    traceback.print_exc()
            else:
                _say(f"{family.name}: {name}: {' '.join(cells[name])}")
            STORED.parent.mkdir(exist_ok=True)
            part = STORED.with_suffix(".part")
            part.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(part, STORED)
    return failed


def table(found: dict) -> str:
    """The section's text below its heading."""
    from support import capability_checks, family_relatives

    columns = list(capability_checks.CHECKS)
    lines = [
        "| Family | Found by | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns),
    ]
    counts = {capability_checks.WORKS: 0, capability_checks.REFUSES: 0}
    for family in family_relatives.EVERY:
        cells = found[family.name]
        outcomes = [cells[name][0] for name in columns]
        for outcome in outcomes:
            counts[outcome] += 1
        shown = ["+" if outcome == capability_checks.WORKS else "–" for outcome in outcomes]
        lines.append(f"| {family.name} | {cells['by']} | " + " | ".join(shown) + " |")
    checked = {}
    for name in columns:
        told = [cells[name][1] for cells in found.values() if cells[name][0] == capability_checks.WORKS]
        checked[name] = max(set(told), key=told.count) if told else "none works"
    how = [f"- **{name}:** {text}." for name, text in checked.items()]
    total = f"{counts['works']} cells work and {counts['refuses']} refuse, of {len(family_relatives.EVERY)} families."
    left = [f"- **{reason}:** {', '.join(names)}." for reason, names in family_relatives.NOT_TRIED.items()]
    return "\n".join([_INTRODUCTION, *lines, "", total, "", *how, "", _LEFT, "", *left, ""])


def write(found: dict) -> None:
    """Replace the section in the README of the tests, and the counts on the first page."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(HEADING)
    after = rest.partition("\n## ")
    following = f"\n## {after[2]}" if after[2] else ""
    README.write_text(f"{before.rstrip()}\n\n{HEADING}{table(found)}{following}", encoding="utf-8")
    text = FRONT.read_text(encoding="utf-8")
    FRONT.write_text(SENTENCE.sub(sentence(README.read_text(encoding="utf-8")), text), encoding="utf-8")


def sentence(text: str) -> str:
    """What the first page says of the table in this text."""
    works, refuses, count = re.search(r"(\d+) cells work and (\d+) refuse, of (\d+) families", text).groups()
    cells = int(works) + int(refuses)
    return f"[{count} families](tests/README.md#every-family) of such models: of {cells} cells {works} work"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
