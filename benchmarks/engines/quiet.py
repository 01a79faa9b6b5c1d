"""Whether anything else ran on this machine while something was measured, and waiting for quiet."""

from __future__ import annotations

import sys
import time

import psutil

QUIET = 0.1  # processors that others may take on average
PATIENCE = 30.0  # seconds to wait for that


class Watch:
    """From its making on: how many processors everything but one process kept busy."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._begun = time.perf_counter()
        self._busy, self._own = _busy(), self._own_seconds()

    def others(self) -> float:
        """Processors, on average; 0.0 where nothing else ran."""
        others = _busy() - self._busy - (self._own_seconds() - self._own)
        return max(0.0, others) / (time.perf_counter() - self._begun)

    def _own_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def wait_for_quiet() -> None:
    """Returns when others leave the machine alone for a second, or when patience ends."""
    begun = time.perf_counter()
    told = False
    while psutil.cpu_percent(1.0) * psutil.cpu_count() / 100 > QUIET:
        if time.perf_counter() - begun > PATIENCE:
            print("the machine is busy: what follows is disturbed", file=sys.stderr)
            return
        if not told:
            print("waiting for the machine to be quiet", file=sys.stderr)
            told = True


def _busy() -> float:
    """Seconds that all processors together have worked since the machine was started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts guests in `user` and `nice` too.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guests)
