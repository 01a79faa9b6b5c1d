"""Reading a request's JSON body within limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from dlp_edge.server.http_errors import HttpError

TIMEOUT = 30.0  # seconds that a body may take to arrive
DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 5.0


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        HttpError: 400 it is none, 408 too slow, 413 larger than `limit` bytes, 415 another type.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page can post without asking is never JSON
        await drain(request.receive)
        raise HttpError(415, f"The content type is {kind!a}. Send application/json.")
    try:
        text = await asyncio.wait_for(_read(request, limit), TIMEOUT)
    except asyncio.TimeoutError:
        raise HttpError(408, f"The body took more than {TIMEOUT:.0f} s to arrive.") from None
    return _parse(text)


async def drain(receive: Receive, limit: int = DRAIN_BYTES, seconds: float = DRAIN_SECONDS) -> None:
    """Reads away what a refused client still sends: closing a connection on unread data would
    take the answer from it."""

    async def discard() -> None:
        left, more = limit, True
        while more and left > 0:
            message = await receive()
            more = message.get("more_body", False)
            left -= len(message.get("body", b""))

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), seconds)


async def _read(request: Request, limit: int) -> bytes:
    text = bytearray()
    async for piece in request.stream():
        text += piece
        if len(text) > limit:
            await drain(request.receive)
            raise HttpError(413, f"The body is larger than {limit} bytes. Send less.")
    return bytes(text)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
        json.dumps(body, ensure_ascii=False).encode()  # an escaped half of a pair is no text
    except (ValueError, RecursionError):
        raise HttpError(400, "The body is not valid JSON. Send a JSON object.") from None
    if not isinstance(body, dict):
        raise HttpError(400, "The body is not a JSON object. Send one.")
    return body
