"""What the machine itself can do: its copy bandwidth, and what this process took of its memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import psutil

_BLOCK = 32 << 20  # bytes, beyond every cache of a consumer's processor


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read and write while they copy; the best of five."""
    arrays = [(np.ones(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.copyto, args=(to, at)) for at, to in arrays]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * _BLOCK * threads / (time.perf_counter() - begun))
    return best


def peak_memory() -> int:
    """The most that this process held in memory, in bytes."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else 1024 * peak  # Linux counts in KiB
