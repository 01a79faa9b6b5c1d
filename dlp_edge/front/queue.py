"""A bounded number of answers at a time, and a bounded queue of requests that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dlp_edge.server.http_errors import HttpError


class FrontQueue:
    """Lets `most` requests generate while at most `waiting` others wait, first come, first served.

    Attributes:
        closed: set it to turn away whoever waits.
    """

    def __init__(self, most: int, waiting: int) -> None:
        self.closed = False
        self._most = most
        self._waiting = waiting
        self._requests = 0
        self._slots = asyncio.Semaphore(most)

    @property
    def running(self) -> int:
        return min(self._requests, self._most)

    @property
    def waiting(self) -> int:
        return max(0, self._requests - self._most)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for its turn.

        Raises:
            HttpError: 429, the queue is full; 503, the front stops.
        """
        if self._requests >= self._most + self._waiting:
            raise HttpError(
                429,
                f"{self._requests} requests are running or waiting. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._requests += 1
        try:
            async with self._slots:
                if self.closed:
                    raise HttpError(503, "The front is stopping. Start it again.")
                yield
        finally:
            self._requests -= 1
