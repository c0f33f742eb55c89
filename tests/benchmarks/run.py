"""Measures this machine: what the nodes cost, as ratios within one run, in ten minutes on a GPU and two on a CPU.

    python tests/benchmarks/run.py                   # all parts that the results lack
    python tests/benchmarks/run.py --parts kernels training
    python tests/benchmarks/run.py --kit             # for a machine where nothing can be installed: kit.py

On a GPU the models have their published shapes and random weights. On a CPU they are small: everything runs once, and
the figures decide nothing; the table says which wait for a GPU. Every output is checked before it is timed, against
fp32 or fp64. A part that fails, or takes longer than it may, leaves what it has found, and the next one follows.
After ten minutes on a GPU, or two on a CPU, no further part is begun, and what is left is told. Figures go to
`--results` as they come, with machine, versions and commit; a second start does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # a test that imports this has the two folders on its path
    # Without this folder, whose names, such as `kernels`, are others', too.
    sys.path[0:1] = [str(ROOT / "tests"), str(ROOT / "workflows")]

from benchmarks import kit  # noqa: E402
from launcher import environment, source  # noqa: E402

RESULTS = Path(".cache") / "benchmark.json"
ROUNDS = {"cuda": 10, "cpu": 3}
COMMIT = "UNDERSTUDY_COMMIT"  # the tree's, where there is no git
MARK = "\x1e"  # before what the measuring process says to this one
QUIET = 15  # lines of its output that are told where it fails


@dataclasses.dataclass(frozen=True)
class Part:
    """A function of a module here, seconds that it may take on a GPU, and what it gives."""

    module: str
    function: str
    seconds: int
    gives: str
    gpu_alone: bool = False


# By worth. On a CPU each may take SECONDS_ON_CPU.
PARTS = {
    "kernels": Part("kernels", "check_all", 40, "every kernel beside the CPU in fp64"),
    "video": Part("restricted_attention", "measure_480p", 70, "R1, R2, R3 of a mask, R4, R5 at 480p; no copy"),
    "guidance": Part("spectral_guidance", "measure_step", 50, "R6 of a step"),
    "capture": Part("token_attention", "measure_steps", 40, "R7"),
    "training": Part("training", "measure", 120, "R8"),
    "nodes, Wan": Part("apply_nodes", "measure_wan", 90, "Wan 14B through every Apply node, bf16 and fp8"),
    "nodes, SDXL": Part("apply_nodes", "measure_sdxl", 45, "SDXL through every Apply node, bf16 and fp8"),
    "nodes, SD 1.5": Part("apply_nodes", "measure_sd15", 30, "SD 1.5 through every Apply node, bf16 and fp8"),
    "nodes, Flux.1": Part("apply_nodes", "measure_flux", 60, "Reference Weight on Flux.1, bf16 and fp8"),
    "compiling": Part("compiling", "measure", 90, "TorchCompileModel without recompiling"),
    "offloading": Part("offloading", "measure", 60, "weights off the device, in sampling and training"),
    "gradients": Part("spectral_guidance", "measure_gradients", 20, "R6 of the gradients"),
    "maps": Part("token_attention", "measure_attentions", 30, "R7's bytes, columns beside the whole map"),
    "video, compiled": Part(
        "restricted_attention", "measure_compiled", 90, "R3 of flex, a compiled merge", gpu_alone=True
    ),
    "video, 720p": Part("restricted_attention", "measure_720p", 120, "R1 to R5 at 720p", gpu_alone=True),
}
SECONDS_ON_CPU = 60
SECONDS_TO_START = 120
SECONDS_IN_ALL = {"cuda": 600, "cpu": 120}  # after which a start begins no further part


class OutOfTimeError(Exception):
    """A part is about to begin, and the time of this start is used up."""


def main() -> int:
    """0 where every part that can run here is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / RESULTS, help="JSON to go on from and to write")
    parser.add_argument("--again", action="store_true", help="forget what the results hold")
    parser.add_argument("--rounds", type=int, help="of what is timed, in turn")
    parser.add_argument("--patience", type=float, default=1.0, help="how many times as long each part may take")
    parser.add_argument("--limit", type=float, help="seconds after which no further part is begun")
    parser.add_argument("--kit", action="store_true", help="write the archive for a machine without a network")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.rounds)
    carried = (ROOT / kit.ARCHIVE).is_file() and not source.find(ROOT)
    # The environment's own Python is taken as it is.
    if not carried and Path(sys.prefix).resolve() != (ROOT / ".cache" / "env").resolve():
        environment.enter(ROOT)
    if arguments.kit:
        print(f"Carry {kit.make(ROOT).relative_to(ROOT)} beside the tree.")
        return 0
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    unpacked = None
    if carried:
        unpacked = kit.unpack(ROOT)
        variables["COMFYUI_PATH"] = str(Path(unpacked.name) / "comfyui")
        paths = [str(Path(unpacked.name) / "site"), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        variables[COMMIT] = (Path(unpacked.name) / kit.COMMIT).read_text(encoding="utf-8")
    results = {} if arguments.again else read(arguments.results)
    chosen = arguments.parts or list(PARTS)
    rounds = ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    command = [sys.executable, os.path.abspath(__file__), *rounds, "--measure"]
    measuring = functools.partial(Measuring, command, variables, arguments.patience)
    supervise(chosen, arguments.results, results, measuring, arguments.limit)
    print(table(results))
    return 0 if all(results["parts"].get(name, {}).get("state") in ("done", "waits") for name in chosen) else 1


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(scratch, path)


def supervise(
    chosen: list[str], path: Path, results: dict, measuring: Callable[[list[str]], Measuring],
    limit: float | None = None,
) -> None:
    """Have a process measure what is missing, and a new one wherever it ends or takes too long.

    After `limit` seconds, or SECONDS_IN_ALL, no part but the first is begun.
    """
    tried: set[str] = set()
    began = time.monotonic()
    results.setdefault("parts", {})

    def missing() -> list[str]:
        done = {name for name, part in results["parts"].items() if part["state"] in ("done", "waits")}
        # First those that no start has tried, so that one that fails again leaves them their time.
        return sorted((name for name in chosen if name not in tried | done), key=results["parts"].__contains__)

    def late(allowed: float) -> bool:
        return bool(tried) and time.monotonic() - began >= (allowed if limit is None else limit)

    while left := missing():
        process = measuring(left)
        try:
            for name in process.follow(path, results, late):
                tried.add(name)
        except OutOfTimeError:
            told = f"The time is used up. Left are {', '.join(missing())}; the same command goes on with them."
            print(told, flush=True)
            return
        finally:
            process.stop()
        if not tried & set(left):  # it never came to a part
            sys.exit("\n".join(["Nothing was measured.", *process.last]))


class Measuring:
    """The process that measures, and what it says: `command` with the names of parts after it."""

    def __init__(self, command: list[str], variables: dict, patience: float, parts: list[str]):
        self.patience = patience
        self.process = subprocess.Popen(
            [*command, *parts], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            errors="replace", env=variables, cwd=ROOT,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.last: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def follow(self, path: Path, results: dict, late: Callable[[float], bool]) -> Iterator[str]:
        """Put into the results what it finds, part by part; yields each that is begun.

        Raises OutOfTimeError where one would begin and late(seconds that all parts may take) is true.
        """
        part, on_cpu, limit = None, False, self.patience * SECONDS_TO_START
        while True:
            try:
                line = self.lines.get(timeout=limit - (time.monotonic() - part["began"]) if part else limit)
            except (queue.Empty, ValueError):
                return self._fail(path, results, part, f"took longer than {limit:.0f} s")
            if line is None:
                return self._fail(path, results, part, "ended")
            if not line.startswith(MARK):
                self.last = [*self.last, line][-QUIET:]
                continue
            said = json.loads(line[1:])
            if "machine" in said:
                _same_machine(results, said["machine"])
                on_cpu = said["machine"]["device"] == "cpu"
            elif "begin" in said:
                name = said["begin"]
                if late(self.patience * SECONDS_IN_ALL["cpu" if on_cpu else "cuda"]):
                    raise OutOfTimeError
                limit = self.patience * (SECONDS_ON_CPU if on_cpu else PARTS[name].seconds)
                part = results["parts"][name] = {"state": "begun", "began": time.monotonic(), "found": []}
                print(f"{name}: {PARTS[name].gives}", flush=True)
                yield name
            elif "end" in said:
                part["state"], part["seconds"] = said["end"], round(time.monotonic() - part.pop("began"), 1)
                part = None
            else:
                part["found"].append(said)
                print(f"  {shown(said)}", flush=True)
            write(path, results)

    def _fail(self, path: Path, results: dict, part: dict | None, how: str) -> None:
        if part is not None:
            part.update(state="failed", seconds=round(time.monotonic() - part.pop("began"), 1))
            part["error"] = "\n".join([how, *self.last])
            print(f"  {how}\n" + "\n".join(f"    {line}" for line in self.last), flush=True)
            write(path, results)


def _same_machine(results: dict, machine: dict) -> None:
    known = results.setdefault("machine", machine)
    different = [key for key, value in machine.items() if known.get(key) != value]
    if different:
        told = ", ".join(f"{key} was {known.get(key)} and is {machine[key]}" for key in different)
        sys.exit(f"The results are another run's ({told}): give --again, or another --results.")


def measure(names: list[str], rounds: int | None) -> int:
    """In a process of its own: run the parts, and say what they find."""

    def say(what: dict) -> None:
        print(MARK + json.dumps(what, ensure_ascii=False), flush=True)

    missing = kit.stand_in()
    import torch
    from support import benchmark

    benchmark.start(False)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    rounds = rounds or ROUNDS[device.type]
    say({"machine": {
        "device": device.type, "name": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "comfyui": source.version_of(source.obtain(ROOT)), "rounds": rounds, "without": missing,
        "commit": os.environ.get(COMMIT) or kit.commit(ROOT),
    }})
    for name in names:
        part = PARTS[name]
        say({"begin": name})
        if part.gpu_alone and not cuda:
            say({"note": "waits for a GPU"})
            say({"end": "waits"})
            continue
        dtype = torch.bfloat16 if cuda else torch.float32
        report = benchmark.Report(device, dtype, not cuda, rounds, say)
        getattr(importlib.import_module(f"benchmarks.{part.module}"), part.function)(report)
        _apply_nodes().release(device)
        say({"end": "done"})
    return 0


def _apply_nodes():
    return importlib.import_module("benchmarks.apply_nodes")


def shown(found: dict) -> str:
    """A line of the terminal."""
    if "note" in found:
        return found["note"]
    if "check" in found:
        return f"{found['check']}: {found['difference']:.1e} from the definition (at most {found['limit']:g})"
    values = found["values"]
    spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    counted = f", {found['counted']:.4f} by arithmetic" if found["counted"] is not None else ""
    aim = f", aim {found['goal']}: {verdict(found)}" if found["goal"] else ""
    unit = f" {found['unit']}" if found["unit"] else ""
    return f"{found['shape']}: {found['name']} {statistics.median(values):.4g}{unit}{spread}{counted}{aim}"


def verdict(figure: dict) -> str:
    """What a figure says about its goal."""
    median = statistics.median(figure["values"])
    if not figure["decides"]:
        return "waits for a GPU"
    if figure["least"] and median < figure["counted"]:
        return "measured wrongly, since it is less than the FLOPs allow"
    sign, limit = figure["goal"].split()
    return "met" if (median <= float(limit) if sign == "≤" else median >= float(limit)) else "missed"


def table(results: dict) -> str:
    """The ratios with a goal, and the parts that did not end."""
    rows = [("figure", "shape", "median", "spread", "arithmetic", "aim", "")]
    for part in results["parts"].values():
        for found in part["found"]:
            if not found.get("goal"):
                continue
            values = found["values"]
            counted = "" if found["counted"] is None else f"{found['counted']:.4f}"
            rows.append((
                found["name"], found["shape"], f"{statistics.median(values):.4f}",
                f"{min(values):.4f} to {max(values):.4f}", counted, found["goal"], verdict(found),
            ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, part in results["parts"].items():
        if part["state"] == "waits":
            lines.append(f"{name}: waits for a GPU ({PARTS[name].gives})")
        elif part["state"] != "done":
            lines.append(f"{name}: {part.get('error', 'did not end').splitlines()[0]} ({PARTS[name].gives})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
