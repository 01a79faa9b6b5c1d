"""`POST /v1/chat/completions` of a front: from a body to an answer, whole or as events."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dlp_edge.front.generation import Chunks, Generation
from dlp_edge.front.metrics import Metrics
from dlp_edge.front.pool import UpstreamPool
from dlp_edge.front.queue import FrontQueue
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.front.upstream import UpstreamLostError, UpstreamRefusedError
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.text.prompt import to_messages
from dlp_edge.server.body import read_json
from dlp_edge.server.chat_request import ChatRequest, Models, parse_request
from dlp_edge.server.events import Events, unless_disconnected
from dlp_edge.server.http_errors import HttpError, to_http_error
from dlp_edge.server.openai_schema import AnswerDocuments
from dlp_edge.types import Message

CONVERSATION = "x-conversation-id"  # the header that names a conversation


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Attributes:
        body: bytes of a request.
        messages: messages of a conversation.
        running: requests that are answered at a time.
        waiting: requests that wait beside them.
        send_seconds: for which a client may leave its connection full before it counts as gone.
    """

    body: int = 1 << 20
    messages: int = 256
    running: int = 64
    waiting: int = 64
    send_seconds: float = 30.0


class FrontAnswering:
    """The ASGI endpoint that answers.

    Args:
        on_error: called with what went wrong on our side.
    """

    def __init__(
        self,
        skills: RoutedSkills,
        models: Models,
        pool: UpstreamPool,
        metrics: Metrics,
        limits: Limits,
        on_error: Callable[[Exception], None],
    ) -> None:
        self.queue = FrontQueue(limits.running, limits.waiting)
        self._skills = skills
        self._models = models
        self._pool = pool
        self._metrics = metrics
        self._limits = limits
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await read_json(request, self._limits.body)
            await self._serve(body, request, send)
        except ClientDisconnect:
            self._count(499)
        except Exception as error:  # all of which is raised before a response began
            await self._http_error(error).response()(scope, receive, send)

    async def _serve(self, body: Mapping[str, Any], request: Request, send: Send) -> None:
        skills = self._skills
        order = parse_request(body, self._models, self._limits.messages, skills.room)
        _check_supported(order)
        options = skills.parse(order.options)
        async with self.queue.slot():
            # On a thread, because reading a long prompt takes its time.
            messages = to_messages(order.messages)
            answer = await asyncio.to_thread(skills.prepare, messages, options)
            conversation = request.headers.get(CONVERSATION) or conversation_of(messages)
            generation = Generation(self._pool, self._metrics, options.decoding, conversation)
            chunks = generation.stream(answer)
            if order.stream:
                work = self._send_pieces(order, answer, chunks, send)
            else:
                work = self._send_whole(order, answer, chunks, request, send)
            await unless_disconnected(request.receive, work)

    async def _send_whole(
        self,
        order: ChatRequest,
        answer: Answer | RequestAnswers,
        chunks: Chunks,
        request: Request,
        send: Send,
    ) -> None:
        async with aclosing(chunks):
            async for _ in chunks:
                pass
        self._count(200)
        document = AnswerDocuments(order.model).whole(answer.reply())
        await JSONResponse(document)(request.scope, request.receive, send)

    async def _send_pieces(
        self,
        order: ChatRequest,
        answer: Answer | RequestAnswers,
        chunks: Chunks,
        send: Send,
    ) -> None:
        documents = AnswerDocuments(order.model, order.include_usage)
        events = Events(send, self._limits.send_seconds)
        try:
            async with aclosing(chunks):
                async for some in chunks:
                    for chunk in some:
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
            await events.send(*documents.last(answer.reply()))
            self._count(200)
        await events.end()

    def _http_error(self, error: Exception) -> HttpError:
        if isinstance(error, (UpstreamLostError, UpstreamRefusedError)):
            self._on_error(error)
            found = HttpError(502, "The servers behind this one failed. Try again later.")
        else:
            found = to_http_error(error)
            if found.status == 500:
                self._on_error(error)
        self._count(found.status)
        return found

    def _count(self, status: int) -> None:
        self._metrics.count("requests", labels=f'status="{status}"')


def conversation_of(messages: list[Message]) -> str:
    """What stays the same in a conversation from turn to turn: its beginning, up to the first
    message of the user."""
    begin: list[str] = []
    for message in messages:
        begin += [message["role"], message["content"]]
        if message["role"] == "user":
            break
    return hashlib.sha256("\0".join(begin).encode()).hexdigest()


def _check_supported(order: ChatRequest) -> None:
    """Refuses what other engines cannot do across a change of fusion.

    Raises:
        HttpError: 400.
    """
    options = order.options
    wrong = None
    if options.get("json_schema") is not None:
        wrong = "response_format", "a grammar does not go on under another fusion"
    elif options.get("tools"):
        wrong = "tools", "calls are not read from other engines"
    elif options.get("logprobs") is not None:
        wrong = "logprobs", "they are not handed on"
    elif options.get("kv", "recompute") != "recompute":
        wrong = "dlp_edge", 'another server recomputes: leave out kv, or set it to "recompute"'
    elif options.get("speculate"):
        wrong = "dlp_edge", "speculate is a setting of the servers behind this one"
    if wrong is not None:
        param, why = wrong
        raise HttpError(400, f"{param} is not supported with this value ({why}).", param)
