"""From a request's body to an answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dlp_edge.runtime.runtime import Runtime
from dlp_edge.runtime.stream import AsyncStream
from dlp_edge.server.body import read_json
from dlp_edge.server.chat_request import Models
from dlp_edge.server.http_errors import HttpError, to_http_error
from dlp_edge.server.interfaces.interface import Documents, Interface
from dlp_edge.server.metrics import Metrics, note_reply
from dlp_edge.server.openai_schema import Document
from dlp_edge.server.request_queue import RequestQueue


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: bytes of a request.
        messages: messages of a conversation.
        parallel: requests that are answered at the same time.
        waiting: requests that wait for one of these to end.
        new_tokens: of an answer whose request sets no limit.
        send_seconds: for which a client may leave its connection full before it counts as gone.
    """

    body: int = 1 << 20
    messages: int = 256
    parallel: int = 16
    waiting: int = 16
    new_tokens: int = 4096
    send_seconds: float = 30.0


class Answering:
    """Answers requests of every interface.

    Args:
        on_error: called with what went wrong on our side.

    Attributes:
        metrics: what it counts.
    """

    def __init__(
        self,
        runtime: Runtime,
        models: Models,
        limits: Limits,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._on_error = on_error
        self._runtime = runtime
        self._models = models
        self._limits = limits
        self._queue = RequestQueue(limits.waiting, limits.parallel)
        self._running: set[AsyncStream] = set()
        self.metrics = Metrics(self._gauges)

    def endpoint(self, interface: Interface) -> ASGIApp:
        """The ASGI application of a path that generates."""
        return _Endpoint(self, interface)

    async def answer(
        self, interface: Interface, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answers one request."""
        request = Request(scope, receive)
        try:
            body = await read_json(request, self._limits.body)
            await self._serve(interface, body, request, send)
        except ClientDisconnect:
            pass
        except Exception as error:  # all of which is raised before a response began
            await self._http_error(error).response()(scope, receive, send)

    async def _serve(
        self, interface: Interface, body: Mapping[str, Any], request: Request, send: Send
    ) -> None:
        limits = self._limits
        order = interface.parse(body, self._models, limits.messages, limits.new_tokens)
        documents = interface.documents(order)
        with self._queue.place():
            # On a thread, because reading a long prompt takes its time.
            stream = AsyncStream(
                await asyncio.to_thread(self._runtime.stream, order.messages, **order.options)
            )
            if order.stream:
                events = _Events(send, limits.send_seconds, interface.named)
                work = self._send_pieces(documents, stream, events)
            else:
                work = self._send_whole(documents, stream, request, send)
            await _unless_disconnected(request.receive, work)

    async def stop(self, grace: float) -> None:
        """Turns away who waits, and ends the answers under way after `grace` seconds."""
        self._queue.closed = True
        await asyncio.sleep(grace)
        for stream in self._running:
            stream.cancel()

    async def _send_whole(
        self, documents: Documents, stream: AsyncStream, request: Request, send: Send
    ) -> None:
        async with self._slot(stream):
            async for _ in stream:
                pass
        document = documents.whole(stream.reply)
        await JSONResponse(document)(request.scope, request.receive, send)

    async def _send_pieces(
        self, documents: Documents, stream: AsyncStream, events: _Events
    ) -> None:
        try:
            async with self._slot(stream):
                async for chunk in stream:
                    if not events.begun:
                        await events.send(*documents.first())
                    await events.send(*documents.piece(chunk))
        except ClientDisconnect:
            raise
        except Exception as error:
            if not events.begun:
                raise  # the status can still say so
            await events.send(self._http_error(error).document)
        else:
            if not events.begun:  # an answer without text
                await events.send(*documents.first())
            await events.send(*documents.last(stream.reply))
        await events.end()

    def _http_error(self, error: Exception) -> HttpError:
        http_error = to_http_error(error)
        if http_error.status == 500:
            self._on_error(error)
        return http_error

    @asynccontextmanager
    async def _slot(self, stream: AsyncStream) -> AsyncIterator[None]:
        """The turn of one request, after which its stream is over in any case."""
        try:
            async with self._queue.slot():
                self._running.add(stream)
                try:
                    yield
                finally:
                    self._running.remove(stream)
        finally:
            await stream.aclose()
            note_reply(stream.reply)

    def _gauges(self) -> dict[str, float]:
        running = self._queue.running
        return {
            "requests_running": running,
            "requests_waiting": self._queue.held - running,
            "prefix_cache_bytes": self._runtime.activity.prefix_bytes,
        }


class _Endpoint:
    """A path that generates."""

    def __init__(self, answering: Answering, interface: Interface) -> None:
        self._answering = answering
        self._interface = interface

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answering.answer(self._interface, scope, receive, send)


class _Events:
    """Server-sent events, the first of which begins the response.

    Args:
        named: see `Interface`.
    """

    def __init__(self, send: Send, seconds: float, named: bool) -> None:
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


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and gives it up when the client goes away."""

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
    if not working.cancelled():
        working.result()
