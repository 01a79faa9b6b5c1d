"""Lets the process end only when no thread is inside native code.

A daemon thread that comes back from C++ or Rust while the interpreter shuts down is ended by
`pthread_exit`, whose unwinding those languages turn into `abort()`. So the exit hook cancels what
runs, waits until it has returned, and lets no other thread in again.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from types import TracebackType
from typing import Protocol

PATIENCE = 10.0  # seconds that the end of the process waits for a call, such as one that loads

_log = logging.getLogger(__name__)


class Cancellable(Protocol):
    """A request that can be cancelled from any thread."""

    def set(self) -> None: ...


class NativeCalls:
    """Counts the calls into native code; a context manager around each of them.

    Raises:
        SystemExit: the process is ending, and this is not its main thread. It ends the thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._count = 0
        self._ending = False
        self._running: weakref.WeakSet[Cancellable] = weakref.WeakSet()

    def __enter__(self) -> None:
        with self._lock:
            # Other exit handlers run on the main thread, and may still ask for something.
            if self._ending and threading.current_thread() is not threading.main_thread():
                raise SystemExit
            self._count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._count -= 1
            if self._ending:
                self._lock.notify_all()

    def cancel_at_exit(self, request: Cancellable) -> None:
        """Cancels a request, if it still exists, when the process ends."""
        with self._lock:
            self._running.add(request)

    def end(self, patience: float = PATIENCE) -> bool:
        """Cancels everything and waits until no call is under way; False if that takes too long."""
        with self._lock:
            self._ending = True
            running = list(self._running)
        for request in running:
            request.set()
        with self._lock:
            ended = self._lock.wait_for(lambda: self._count == 0, patience)
        if not ended:
            _log.warning("a thread is still inside native code: the process may end by abort()")
        return ended


native_calls = NativeCalls()
atexit.register(lambda: native_calls.end())
if hasattr(os, "register_at_fork"):
    # The parent's threads, and their calls, are not in the child.
    os.register_at_fork(after_in_child=native_calls.__init__)  # type: ignore[misc]
