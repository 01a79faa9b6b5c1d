"""The stub CUDA runtime's counters (`stub.c`)."""

from __future__ import annotations

import ctypes

LIBRARY = "libcudart.so.13"


class Counts(ctypes.Structure):
    """What the provider did since the last reset. The fields are those of `struct counts`.

    Attributes:
        gemms: calls of cuBLAS, each at least one kernel more.
        captured_launches, captured_gemms: those of the last capture.
    """

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            "launches gemms captures replays allocations captured_launches captured_gemms"
            " captured_allocations captured_frees captured_syncs captured_pageable_copies"
        ).split()
    ]

    def illegal(self) -> dict[str, int]:
        """What happened during captures and must not: name -> how often."""
        names = ("allocations", "frees", "syncs", "pageable_copies")
        found = {name: int(getattr(self, f"captured_{name}")) for name in names}
        return {name: count for name, count in found.items() if count}


class Stub:
    """The stub, loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.stub_counts.argtypes = [ctypes.POINTER(Counts)]
        self._library.stub_limit.argtypes = [ctypes.c_long]

    def counts(self) -> Counts:
        counts = Counts()
        self._library.stub_counts(ctypes.byref(counts))
        return counts

    def reset(self) -> None:
        self._library.stub_reset()

    def limit(self, size: int) -> None:
        """Leave this many bytes of device memory; -1 is no limit."""
        self._library.stub_limit(size)


def find_stub() -> Stub | None:
    """The stub; None if there is no CUDA, or the real one."""
    try:
        stub = Stub()
    except (OSError, AttributeError):
        return None
    return stub
