"""One answer at a time, a bounded line of requests that wait for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter

from dlp_edge.server.http_errors import Problem


class Gate:
    """Lets one request generate while at most `waiting` others wait, in the order in which they
    came.

    Attributes:
        closed: set to turn away those that still wait.
    """

    def __init__(self, waiting: int) -> None:
        self.closed = False
        self._waiting = waiting
        self._inside = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._last_seconds = 1.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line.

        Raises:
            Problem: 429, the line is full; Retry-After is what the last answer took.
        """
        if self._inside > self._waiting:
            seconds = min(60, max(1, math.ceil(self._last_seconds)))
            raise Problem(
                429,
                f"{self._inside} requests are under way or waiting. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for the requests before this one.

        Raises:
            Problem: 503, the server stops.
        """
        async with self._turn:
            if self.closed:
                raise Problem(503, "The server is stopping. Start it again.")
            begun = perf_counter()
            try:
                yield
            finally:
                self._last_seconds = perf_counter() - begun
