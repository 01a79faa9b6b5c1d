"""What NVIDIA's driver says of the first GPU, through its library NVML."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        driver: the driver's version.
        cuda: the newest CUDA release that the driver supports, as (major, minor).
        free, total: bytes of memory.
    """

    name: str
    driver: str
    cuda: tuple[int, int]
    free: int
    total: int


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def find_gpu() -> Gpu | None:
    """The first GPU; None if there is no driver or no GPU."""
    try:
        nvml = ctypes.CDLL(_LIBRARY)
        if nvml.nvmlInit_v2():
            return None
    except (OSError, AttributeError):
        return None
    try:
        handle, memory, cuda = ctypes.c_void_p(), _Memory(), ctypes.c_int()
        name, driver = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
        failed = (
            nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
            or nvml.nvmlDeviceGetName(handle, name, len(name))
            or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            or nvml.nvmlSystemGetDriverVersion(driver, len(driver))
            or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        )
        if failed:
            return None
        release = (cuda.value // 1000, cuda.value % 1000 // 10)
        return Gpu(name.value.decode(), driver.value.decode(), release, memory.free, memory.total)
    finally:
        nvml.nvmlShutdown()
