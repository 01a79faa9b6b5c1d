"""An answer as a stream of chunks, for threads and for asyncio."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

from dlp_edge.errors import UsageError
from dlp_edge.runtime.batching.job import Job
from dlp_edge.runtime.batching.scheduler import Scheduler
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.ort_errors import ANSWERING, memory_for
from dlp_edge.types import Chunk, Reply


class Stream:
    """A running answer: iterate over its chunks; `reply` has the answer so far at any time.

    Args:
        job: what is generated, with others.
        scheduler: where it takes its place when the first chunk is asked for.
        wait: whether to wait for room.
        on_end: called with the reply once the answer is complete, cancelled or abandoned, but not
            after an error.
    """

    def __init__(
        self,
        job: Job,
        scheduler: Scheduler,
        wait: bool = True,
        on_end: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        self._job = job
        self._scheduler = scheduler
        # Not a method: an abandoned stream must be freed at once, so nothing refers back to it.
        self._chunks = _generate(job, scheduler, wait, on_end)

    def __iter__(self) -> Iterator[Chunk]:
        return self  # who iterates holds the stream, and so keeps it known to its Runtime

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def finish(self) -> Reply:
        """Generates the rest and returns the reply."""
        for _ in self._chunks:
            pass
        return self.reply

    def cancel(self) -> None:
        """Stops the answer, in the middle of a pass if need be; callable from any thread."""
        self._job.interrupt.set()
        self._scheduler.wake(self._job)

    def close(self) -> None:
        """Stops the answer and releases the engine: at once, or at the next token if another thread
        generates it."""
        self.cancel()
        with contextlib.suppress(ValueError):  # "generator already executing"
            self._chunks.close()
            if not self._job.begun:
                self._job.let_go()

    @property
    def ended(self) -> bool:
        """Whether the stream is exhausted or closed."""
        return inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED

    @property
    def reply(self) -> Reply:
        """The answer so far, with sentences and timings."""
        return self._job.reply()


class OpenStreams:
    """The streams of a Runtime, so that closing it ends them.

    Args:
        closing: set once the Runtime closes.
    """

    def __init__(self, closing: Interrupt) -> None:
        self._closing = closing
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, stream: Stream) -> Stream:
        """The stream itself.

        Raises:
            UsageError: the Runtime was closed meanwhile.
        """
        with self._lock:
            if self._closing.is_set():
                raise closed_error()
            self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Ends all of them."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()


def closed_error() -> UsageError:
    """For a request to a Runtime after `close`."""
    return UsageError("this Runtime is closed", "Make a new one")


class AsyncStream:
    """A stream for asyncio; generation runs on a thread of its own."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ended = False
        # One thread for all steps, which may have to wait for their turn.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dlp-edge")

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        import asyncio  # who awaits this has it loaded; loading a bundle does without

        loop = asyncio.get_running_loop()
        try:
            chunk = await loop.run_in_executor(self._thread, next, self._stream, None)
        except BaseException:  # asyncio.CancelledError among them: the consumer is gone
            self._stop()
            raise
        if chunk is None:
            self._stop()
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops the answer, and returns once the engine is released."""
        import asyncio

        closing = self._stop()
        if closing is not None:
            await asyncio.wrap_future(closing)

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._stream.cancel()

    @property
    def reply(self) -> Reply:
        """As `Stream.reply`."""
        return self._stream.reply

    def __del__(self) -> None:
        # No more than this: the collector may call it while this very thread holds the locks of
        # the executor. An unreferenced executor closes itself.
        self._stream.cancel()

    def _stop(self) -> Future[None] | None:
        """Closes the stream on its thread; None if that was done before."""
        if self._ended:
            return None
        self._ended = True
        self._stream.cancel()
        closing = self._thread.submit(self._stream.close)
        self._thread.shutdown(wait=False)
        return closing


def _generate(
    job: Job, scheduler: Scheduler, wait: bool, on_end: Callable[[Reply], None]
) -> Generator[Chunk, None, None]:
    job.answer.requested_at = perf_counter()
    try:
        with memory_for(ANSWERING):
            yield from scheduler.run(job, wait)
    except GeneratorExit:
        on_end(job.reply())
        raise
    else:
        if job.begun:
            on_end(job.reply())
