"""Reads the files named on standard input, one per line, in a separate process, and reports the cost of each.

Prints one JSON line per file: the error (null if it was read), CPU seconds, and by how many MB the peak of memory
exceeds the memory at the start.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "workflows"))

from launcher import scripts  # noqa: E402

scripts.alias_pack()
scripts.add_comfy_path(Path(sys.argv[1]))

from pack.nodes.files import names, weights  # noqa: E402


def _memory(field: str) -> float:
    """MB of this process: `VmRSS` now, `VmHWM` the peak since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    for line in sys.stdin:
        path = line.rstrip("\n")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use
        before, start, error = _memory("VmRSS"), time.process_time(), None
        try:
            weights.read(path)
        except names.WeightFileError as refusal:
            error = str(refusal)
        seconds, megabytes = time.process_time() - start, _memory("VmHWM") - before
        answer = {"path": path, "error": error, "seconds": seconds, "megabytes": megabytes}
        print(json.dumps(answer), flush=True)


main()
