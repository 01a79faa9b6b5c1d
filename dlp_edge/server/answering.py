"""`POST /v1/chat/completions`: from a body to an answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dlp_edge.runtime.runtime import Runtime
from dlp_edge.runtime.stream import AsyncStream
from dlp_edge.server.body import read_json
from dlp_edge.server.chat_request import ChatRequest, Models, parse_request
from dlp_edge.server.http_errors import HttpError, to_http_error
from dlp_edge.server.metrics import Metrics, note_reply
from dlp_edge.server.openai_schema import AnswerDocuments, Document
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
    """The ASGI endpoint that generates.

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await read_json(request, self._limits.body)
            await self._serve(body, request, send)
        except ClientDisconnect:
            pass
        except Exception as error:  # all of which is raised before a response began
            await self._http_error(error).response()(scope, receive, send)

    async def _serve(self, body: Mapping[str, Any], request: Request, send: Send) -> None:
        limits = self._limits
        order = parse_request(body, self._models, limits.messages, limits.new_tokens)
        with self._queue.place():
            # On a thread, because reading a long prompt takes its time.
            stream = AsyncStream(
                await asyncio.to_thread(self._runtime.stream, order.messages, **order.options)
            )
            if order.stream:
                work = self._send_pieces(order, stream, _Events(send, limits.send_seconds))
            else:
                work = self._send_whole(order, stream, request, send)
            await _unless_disconnected(request.receive, work)

    async def stop(self, grace: float) -> None:
        """Turns away who waits, and ends the answers under way after `grace` seconds."""
        self._queue.closed = True
        await asyncio.sleep(grace)
        for stream in self._running:
            stream.cancel()

    async def _send_whole(
        self, order: ChatRequest, stream: AsyncStream, request: Request, send: Send
    ) -> None:
        async with self._slot(stream):
            async for _ in stream:
                pass
        document = AnswerDocuments(order.model).whole(stream.reply)
        await JSONResponse(document)(request.scope, request.receive, send)

    async def _send_pieces(self, order: ChatRequest, stream: AsyncStream, events: _Events) -> None:
        documents = AnswerDocuments(order.model)
        try:
            async with self._slot(stream):
                async for chunk in stream:
                    if not events.begun:
                        await events.send(documents.first())
                    await events.send(documents.piece(chunk))
        except ClientDisconnect:
            raise
        except Exception as error:
            if not events.begun:
                raise  # the status can still say so
            await events.send(self._http_error(error).document)
        else:
            if not events.begun:  # an answer without text
                await events.send(documents.first())
            await events.send(documents.last(stream.reply))
            if order.include_usage:
                await events.send(documents.usage(stream.reply))
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


class _Events:
    """Server-sent events, the first of which begins the response."""

    def __init__(self, send: Send, seconds: float) -> None:
        self.begun = False
        self._send = send
        self._seconds = seconds

    async def send(self, document: Document) -> None:
        """Raises ClientDisconnect where the client takes nothing any more."""
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(json.dumps(document, ensure_ascii=False, separators=(",", ":")))

    async def end(self) -> None:
        await self._write("[DONE]", more=False)

    async def _write(self, data: str, more: bool = True) -> None:
        body = f"data: {data}\n\n".encode()
        message = {"type": "http.response.body", "body": body, "more_body": more}
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
