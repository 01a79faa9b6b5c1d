"""A response as server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from dlp_edge.server.openai_schema import Document


class Events:
    """Server-sent events, the first of which begins the response.

    Args:
        seconds: for which a client may leave its connection full before it counts as gone.
        named: whether events carry their documents' `type` as their names, and the last document
            ends the stream; otherwise `[DONE]` does.
    """

    def __init__(self, send: Send, seconds: float, named: bool = False) -> None:
        self.begun = False
        self._send = send
        self._seconds = seconds
        self._named = named

    async def send(self, *documents: Document) -> None:
        """Raises ClientDisconnect where the client takes nothing any more."""
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write("".join(map(self._event, documents)))

    async def end(self) -> None:
        await self._write("" if self._named else "data: [DONE]\n\n", more=False)

    def _event(self, document: Document) -> str:
        data = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        name = document.get("type", "error") if self._named else None
        return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"

    async def _write(self, text: str, more: bool = True) -> None:
        message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
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
