"""One answer at a time, and a bounded queue of waiting requests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter

from dlp_edge.server.http_errors import HttpError


class RequestQueue:
    """Lets one request generate while at most `waiting` others wait, first come, first served.

    Attributes:
        closed: set it to reject the waiting requests.
    """

    def __init__(self, waiting: int) -> None:
        self.closed = False
        self._waiting = waiting
        self._requests = 0
        self._slot = asyncio.Lock()  # first come, first served
        self._last_seconds = 1.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place in the queue.

        Raises:
            HttpError: 429, the queue is full; Retry-After is the duration of the last answer.
        """
        if self._requests > self._waiting:
            seconds = min(60, max(1, math.ceil(self._last_seconds)))
            raise HttpError(
                429,
                f"{self._requests} requests are running or waiting. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for the earlier requests, then holds the engine.

        Raises:
            HttpError: 503, the server stops.
        """
        async with self._slot:
            if self.closed:
                raise HttpError(503, "The server is stopping. Start it again.")
            started = perf_counter()
            try:
                yield
            finally:
                self._last_seconds = perf_counter() - started
