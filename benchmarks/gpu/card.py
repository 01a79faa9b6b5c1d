"""The GPU's memory and bandwidth, as NVIDIA's driver states them (NVML)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from dlp_edge.runtime.engine.nvidia import find_gpu

_MEMORY_CLOCK = 2
_PER_CLOCK = 2  # transfers: GDDR and HBM are clocked at half of their data rate


@dataclass(frozen=True)
class Card:
    """A GPU; `bandwidth` in bytes per second, from its memory's clock and width."""

    name: str
    driver: str
    total: int
    bandwidth: float

    def used(self) -> int:
        gpu = find_gpu()
        return gpu.total - gpu.free if gpu else 0


def find_card() -> Card | None:
    """The first GPU; None if there is none."""
    gpu = find_gpu()
    if gpu is None:
        return None
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    nvml.nvmlInit_v2()
    handle, clock, width = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
    nvml.nvmlDeviceGetMaxClockInfo(handle, _MEMORY_CLOCK, ctypes.byref(clock))
    nvml.nvmlDeviceGetMemoryBusWidth(handle, ctypes.byref(width))
    nvml.nvmlShutdown()
    bandwidth = _PER_CLOCK * clock.value * 1e6 * width.value / 8
    return Card(gpu.name, gpu.driver, gpu.total, bandwidth)
