"""The memory of a server's process, and a limit on it. Linux only."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from launcher.server import Server

COUNTED = Path("/proc/self/statm").exists()


def resident_megabytes(server: Server) -> float:
    """Megabytes that the process has in memory now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def address_space(server: Server) -> int:
    """Bytes that the process has asked for."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def growth(used: list[float], warm_up: int, fifth: int) -> float:
    """Megabytes per prompt, between the medians of the first and the last fifth after a warm-up.

    Medians, since the allocator grows in steps.
    """
    first, last = sorted(used[warm_up : warm_up + fifth]), sorted(used[-fifth:])
    return (last[fifth // 2] - first[fifth // 2]) / (len(used) - warm_up - fifth)


@contextlib.contextmanager
def limited(server: Server, limit: int) -> Iterator[None]:
    """Limit the process to `limit` bytes of address space."""
    import resource  # not on Windows

    before = resource.prlimit(server.process.pid, resource.RLIMIT_AS)
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, before)
