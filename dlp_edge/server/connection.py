"""An HTTP connection that is closed if it keeps a place without asking for anything."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # that a request's header may take to arrive
MAX_IDLE = 64  # connections without a whole header; beyond, the oldest is closed


class Connection(H11Protocol):
    """Waits for a request's header for a limited time, and gives way to newer connections.

    A client that sends its request at once is answered, however many others hold connections:
    those without a request are closed first, of the peer that has most of them.
    """

    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits for a request's header."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        self._watch()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Starts the deadline of a header; bytes that trickle in do not move it."""
        if not self.is_idle:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._deadline = None
        if self.is_idle:
            self.transport.abort()

    def _make_room(self) -> None:
        idle = [c for c in self.connections if isinstance(c, Connection) and c.is_idle]
        if len(idle) <= MAX_IDLE:
            return
        peers = Counter(connection.client and connection.client[0] for connection in idle)
        victim = min(
            (connection for connection in idle if connection is not self),
            key=lambda c: (-peers[c.client and c.client[0]], c._since),
        )
        victim.transport.abort()
        self.connections.discard(victim)
