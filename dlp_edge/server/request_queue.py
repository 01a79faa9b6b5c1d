"""Several answers side by side, and a bounded queue of waiting requests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter

from dlp_edge.server.http_errors import HttpError


class RequestQueue:
    """Lets some requests generate while at most `waiting` others wait, first come, first served.

    Args:
        parallel: the most requests that generate at the same time.

    Attributes:
        closed: set it to reject the waiting requests.
        running: requests that generate.
        held: requests that have a place, running or waiting.
    """

    def __init__(self, waiting: int, parallel: int) -> None:
        self.closed = False
        self.running = 0
        self.held = 0
        self._places = waiting + parallel
        self._slots = asyncio.Semaphore(parallel)  # first come, first served
        self._last_seconds = 1.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place in the queue.

        Raises:
            HttpError: 429, the queue is full; Retry-After is the duration of the last answer.
        """
        if self.held >= self._places:
            seconds = min(60, max(1, math.ceil(self._last_seconds)))
            raise HttpError(
                429,
                f"{self.held} requests are running or waiting. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for the earlier requests, then takes part in the engine's batch.

        Raises:
            HttpError: 503, the server stops.
        """
        async with self._slots:
            if self.closed:
                raise HttpError(503, "The server is stopping. Start it again.")
            started = perf_counter()
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1
                self._last_seconds = perf_counter() - started
