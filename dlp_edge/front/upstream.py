"""One vLLM server: its completions as token ids, and whether it is well."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx2

from dlp_edge.errors import DlpEdgeError

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 5.0
ERROR_BYTES = 64 << 10  # of an error response that are read
_PREFIX = "data: "


class UpstreamLostError(DlpEdgeError):
    """The server went away, or failed, before the completion was whole: another may go on."""


class UpstreamRefusedError(DlpEdgeError):
    """The server does not want this request, and no other would."""


@dataclass(frozen=True)
class Piece:
    """Some more tokens of a completion.

    Attributes:
        finish: why it ends after them; None if it goes on.
    """

    ids: list[int]
    finish: str | None


class Upstream:
    """A vLLM server.

    Args:
        url: where it serves /v1 and /health.
        silence: seconds without a token after which it counts as lost.

    Attributes:
        is_up: whether it answered when it was last asked.
        running: completions under way from here.
    """

    def __init__(self, url: str, client: httpx2.AsyncClient, silence: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.is_up = False
        self.running = 0
        self._client = client
        self._timeout = httpx2.Timeout(silence, connect=CONNECT_SECONDS)

    async def check(self) -> None:
        """Asks it whether it is well."""
        try:
            response = await self._client.get(f"{self.url}/health", timeout=HEALTH_SECONDS)
            self.is_up = response.status_code == 200
        except httpx2.HTTPError:
            self.is_up = False

    async def complete(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Streams a completion. Closing the iterator ends it at the server, too.

        Raises:
            UpstreamLostError, UpstreamRefusedError
        """
        self.running += 1
        try:
            async with self._client.stream(
                "POST", f"{self.url}/v1/completions", json=body, timeout=self._timeout
            ) as response:
                if response.status_code != 200:
                    raise await self._refusal(response)
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        piece = self._piece(event)
                        yield piece
                        if piece.finish is not None:
                            return
            raise self._lost("its answer broke off")
        except httpx2.HTTPError as error:
            raise self._lost(type(error).__name__) from error
        finally:
            self.running -= 1

    def _piece(self, event: str) -> Piece:
        try:
            document = json.loads(event)
            if "error" in document:
                raise self._lost(_message(document))
            if not document["choices"]:  # only usage
                return Piece([], None)
            (choice,) = document["choices"]
            ids, finish = choice["token_ids"] or [], choice["finish_reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise UpstreamRefusedError(
                f"{self.url} sends no token ids", "Run the vLLM that docs/scale.md names"
            ) from error
        return Piece(ids, finish)

    async def _refusal(self, response: httpx2.Response) -> DlpEdgeError:
        status = response.status_code
        text = b""
        async for part in response.aiter_bytes():
            text += part
            if len(text) > ERROR_BYTES:
                break
        try:
            message = _message(json.loads(text))
        except ValueError:
            message = f"status {status}"
        if status >= 500 or status == 429:
            return self._lost(message)
        remedy = "Start it with the exported launch file, and the plugin installed"
        return UpstreamRefusedError(f"{self.url} refuses: {message}", remedy)

    def _lost(self, what: str) -> UpstreamLostError:
        return UpstreamLostError(f"the server {self.url} failed ({what})", "Look at its log")


async def _events(response: httpx2.Response) -> AsyncGenerator[str, None]:
    """The data of server-sent events, up to the last."""
    async for line in response.aiter_lines():
        if line.startswith(_PREFIX):
            if line == "data: [DONE]":
                return
            yield line[len(_PREFIX) :]


def _message(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:300]
