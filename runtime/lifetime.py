"""How long a Runtime lives: in one process, until it is closed, dropped, or the process ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from dlp_edge.errors import UsageError
from dlp_edge.runtime.batching.scheduler import Scheduler
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.loaded_bundle import LoadedBundle
from dlp_edge.runtime.memory import release_memory
from dlp_edge.runtime.stream import OpenStreams, closed_error

if TYPE_CHECKING:
    from typing_extensions import Self


class Lifetime:
    """What is loaded, who uses it, and how that ends; the base of `Runtime`.

    A process that ends without `close` is taken care of by `dlp_edge.native_calls`.
    """

    def __init__(self, max_parallel: int) -> None:
        self._process = os.getpid()
        self._closing = Interrupt()
        self._scheduler = Scheduler(max_parallel)
        self._streams = OpenStreams(self._closing)
        self._loaded: LoadedBundle | None = None

    def close(self) -> None:
        """Ends all streams and frees the memory; later requests raise UsageError.

        Does nothing in a forked process, whose threads are gone.
        """
        if self._process != os.getpid():
            return
        self._closing.set()
        self._end_streams()
        with self._alone(given_up=self._end_streams):
            self._loaded = None
        self._scheduler.close()
        release_memory()

    @contextlib.contextmanager
    def _alone(
        self, wait: bool = True, given_up: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """Uses the engine while no request does.

        Raises:
            UsageError: the Runtime was closed meanwhile.
        """
        if not self._scheduler.acquire(given_up or self._closing.is_set, wait):
            raise closed_error()
        try:
            yield
        finally:
            self._scheduler.release()

    def _end_streams(self) -> bool:
        """Ends all streams; False, since closing is never given up."""
        self._streams.close()
        return False

    def __del__(self) -> None:
        """Returns the memory of a Runtime that was not closed, unless a stream still uses it."""
        if getattr(self, "_loaded", None) is not None and not sys.is_finalizing():
            self._loaded = None
            release_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a Runtime cannot be sent to another process",
            "Send the bundle's path and load it there",
        )

    def _open(self) -> LoadedBundle:
        if self._loaded is None:
            raise closed_error()
        if self._process != os.getpid():  # onnxruntime's threads do not survive a fork
            raise UsageError(
                "this Runtime was loaded before its process forked", "Load it in the new process"
            )
        return self._loaded
