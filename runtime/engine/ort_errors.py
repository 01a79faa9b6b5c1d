"""What goes wrong in the engine, with types: memory that runs out is a MemoryError inside and one
ResourceError at the edge of the Runtime."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from dlp_edge.errors import BundleError, DeviceError, ResourceError
from dlp_edge.runtime.engine.interrupt import Cancelled

LOADING = (
    "there is not enough memory to load the bundle",
    "Close other programs, or use a smaller or quantised bundle",
)
ANSWERING = (
    "memory ran out while answering",
    "Use a shorter prompt or context, or close other sessions",
)
CHANGING = ("memory ran out while changing the bundle", "Close other programs and load it again")


@contextlib.contextmanager
def memory_for(what: tuple[str, str]) -> Iterator[None]:
    """Raises ResourceError, with this cause and remedy, for a MemoryError of its body."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(*what) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether what onnxruntime raised says that there is no memory, on the host or the device:
    its exceptions share no class of their own."""
    said = str(error).lower()
    words = ("bad_alloc", "allocate", "out of memory")
    return isinstance(error, MemoryError) or any(word in said for word in words)


def first_line(error: Exception) -> str:
    """What an onnxruntime error says, without its stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def let_go(error: BaseException) -> None:
    """Clears the frames of an error and of those that it was raised from: they hold what was
    loaded."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__


@contextlib.contextmanager
def engine_errors(kind: str) -> Iterator[None]:
    """Gives what onnxruntime raises a type: its exceptions share no class of their own."""
    try:
        yield
    except Cancelled:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        if kind != "cpu" and "CUDA" in str(error).upper():
            raise DeviceError(
                f"the device failed ({first_line(error)})", "Check its driver, then load again"
            ) from error
        raise BundleError(
            f"the backbone's graph does not run ({first_line(error)})", "Export the bundle again"
        ) from error
