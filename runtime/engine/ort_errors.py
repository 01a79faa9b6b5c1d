"""Typed errors for onnxruntime's exceptions, which have no common base class.

Out of memory is a MemoryError inside the engine and a ResourceError at the Runtime's public API.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

from dlp_edge.errors import (
    BundleError,
    DeviceError,
    DeviceMemoryError,
    DlpEdgeError,
    ResourceError,
)
from dlp_edge.runtime.engine.interrupt import Cancelled

LOADING = (
    "there is not enough memory to load the bundle",
    "Close other programs, or use a smaller or quantised bundle",
)
ANSWERING = (
    "out of memory while answering",
    "Use a shorter prompt or context, or close other sessions",
)
CHANGING = ("out of memory while changing the bundle", "Close other programs and load it again")


@contextlib.contextmanager
def memory_for(cause_and_remedy: tuple[str, str]) -> Iterator[None]:
    """Turn a MemoryError of the body into a ResourceError with this cause and remedy."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(*cause_and_remedy) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or the device ran out of memory."""
    message = str(error).lower()
    phrases = ("bad_alloc", "allocate", "out of memory")
    return isinstance(error, MemoryError) or any(phrase in message for phrase in phrases)


def out_of_memory(error: Exception, kind: str) -> MemoryError | DeviceMemoryError:
    """The error for a device of this kind that ran out of memory."""
    if kind == "cpu":
        return MemoryError(first_line(error))
    return DeviceMemoryError(
        f"the GPU has not enough free memory ({first_line(error)})",
        'Use device="cpu" (--device cpu), a smaller max_context, or a smaller format',
    )


def first_line(error: Exception) -> str:
    """The first line of the message, without onnxruntime's stack trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def let_go(error: BaseException) -> None:
    """Clear the frames of an error and its causes, which keep loaded data alive."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__


@contextlib.contextmanager
def engine_errors(kind: str) -> Iterator[None]:
    """Raise the body's onnxruntime exceptions as MemoryError, DeviceError or BundleError.

    Args:
        kind: of the device.
    """
    try:
        yield
    except (Cancelled, DlpEdgeError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, kind) from error
        if kind != "cpu" and re.search("cuda|webgpu|device", str(error), re.IGNORECASE):
            raise DeviceError(
                f"the device failed ({first_line(error)})",
                "Check its driver, then load the bundle again",
            ) from error
        raise BundleError(
            f"the backbone's graph failed to run ({first_line(error)})", "Export the bundle again"
        ) from error
