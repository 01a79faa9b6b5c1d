"""An answer as a stream of chunks, and the turn that one request at a time has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator

from dlp_edge.errors import BusyError
from dlp_edge.runtime.answer import Answer
from dlp_edge.runtime.generation import Engine, stream_answer
from dlp_edge.runtime.interrupt import Interrupt
from dlp_edge.types import Chunk, Reply


class Stream:
    """An answer under way: iterate over its chunks; `reply` is the whole of it at any time."""

    def __init__(self, engine: Engine, answer: Answer, turn: Turn) -> None:
        self._answer = answer
        self._interrupt = Interrupt()
        # Not a method: an abandoned stream must be freed at once, so nothing refers back to it.
        self._chunks = _take_turn(turn, engine, answer, self._interrupt)

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def cancel(self) -> None:
        """Ends the answer in the middle of whatever it does; callable from any thread."""
        self._interrupt.set()

    def close(self) -> None:
        """Ends the answer now, or at the next token where another thread is in the middle of
        it, and lets other requests go on."""
        self.cancel()
        with contextlib.suppress(ValueError):  # "generator already executing"
            self._chunks.close()

    @property
    def reply(self) -> Reply:
        """The answer so far, with the sentences and the timings."""
        return self._answer.reply()


def _take_turn(
    turn: Turn, engine: Engine, answer: Answer, interrupt: Interrupt
) -> Generator[Chunk, None, None]:
    if not turn.acquire(interrupt.is_set):
        return
    try:
        yield from stream_answer(engine, answer, interrupt)
    finally:
        turn.release()


class Turn:
    """Lets one request at a time use the engine. A lock that can be given up while waiting, and
    that names the deadlock of a thread that starts a request inside its own unfinished stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def acquire(self, given_up: Callable[[], bool]) -> bool:
        """Waits for the turn, asking `given_up` now and then; False if it said so."""
        if self._owner == threading.get_ident():
            raise BusyError(
                "this thread has an unfinished stream on the same Runtime",
                "Exhaust or close it first",
            )
        while not self._lock.acquire(timeout=0.05):
            if given_up():
                return False
        self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        self._owner = None
        self._lock.release()
