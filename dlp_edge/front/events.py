"""A response as server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from dlp_edge.server.openai_schema import Document

_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


class Events:
    """Server-sent events, the first of which begins the response.

    Args:
        seconds: for which a client may leave its connection full before it counts as gone.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self.begun = False
        self._send = send
        self._seconds = seconds

    async def send(self, document: Document) -> None:
        """Raises ClientDisconnect where the client takes nothing any more."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._write(json.dumps(document, ensure_ascii=False, separators=(",", ":")), True)

    async def end(self) -> None:
        await self._write("[DONE]", False)

    async def _write(self, data: str, more: bool) -> None:
        body = f"data: {data}\n\n".encode()
        message = {"type": "http.response.body", "body": body, "more_body": more}
        try:
            await asyncio.wait_for(self._send(message), self._seconds)
        except asyncio.TimeoutError:
            raise ClientDisconnect from None


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and gives it up when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watching, working = asyncio.create_task(watch()), asyncio.create_task(work)
    try:
        await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.wait((watching, working))
    if working.cancelled():
        raise ClientDisconnect
    working.result()
