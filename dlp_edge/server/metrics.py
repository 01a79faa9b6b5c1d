"""What the server counts, as Prometheus reads it, and a log line for every request.

Prompts and answers are in neither.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from time import perf_counter, time
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlp_edge.types import Reply

log = logging.getLogger("dlp_edge.requests")

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATHS = frozenset(
    "/v1/chat/completions /v1/completions /v1/responses /v1/embeddings /v1/models /health "
    "/metrics /".split()
)  # others count as one: a client may ask for any number of paths
_HELP = {
    "requests_total": "HTTP requests that were answered",
    "request_seconds_total": "seconds from a request's header to the end of its answer",
    "requests_running": "requests that generate",
    "requests_waiting": "requests that wait for room",
    "prompt_tokens_total": "tokens of prompts",
    "cached_tokens_total": "tokens of prompts that a KV cache had already",
    "completion_tokens_total": "tokens of answers",
    "first_token_seconds_total": "seconds to the first tokens, waiting included",
    "answers_total": "answers, by the reason for which they ended",
    "sentences_total": "sentences by the adapters that wrote them",
    "routings_total": "questions to the router",
    "router_seconds_total": "seconds of the router",
    "switches_total": "changes of the fusion within answers",
    "switch_seconds_total": "seconds of writing fusions into the slots",
    "prefix_cache_bytes": "bytes of the KV caches of shared prefixes",
}
_Labels = tuple[tuple[str, str], ...]


def log_requests() -> None:
    """Writes the log to standard error, a JSON document per line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class _Record:
    """One request: what its endpoint has to say about it."""

    reply: Reply | None = None


_record: ContextVar[_Record | None] = ContextVar("record", default=None)


def note_reply(reply: Reply) -> None:
    """Tells the metrics and the log about the answer to the request under way."""
    record = _record.get()
    if record is not None:
        record.reply = reply


class Metrics:
    """Counters since the server's start.

    Args:
        gauges: name -> what is true now.
    """

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        self._gauges = gauges
        self._counters: defaultdict[tuple[str, _Labels], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counters[name, tuple(sorted(labels.items()))] += amount

    def add_reply(self, reply: Reply) -> None:
        """Counts an answer, whole or cut short."""
        usage, timings = reply.usage, reply.timings
        self.add("answers_total", reason=reply.finish_reason)
        self.add("prompt_tokens_total", usage.prompt_tokens)
        self.add("cached_tokens_total", usage.cached_tokens)
        self.add("completion_tokens_total", usage.completion_tokens)
        self.add("first_token_seconds_total", timings.first_token)
        self.add("routings_total", timings.routings)
        self.add("router_seconds_total", timings.router)
        self.add("switches_total", timings.switches)
        self.add("switch_seconds_total", timings.switch)
        for sentence in reply.sentences:
            for name in sentence.fusion or {"base": 1.0}:
                self.add("sentences_total", adapter=name)

    async def endpoint(self, request: Request) -> Response:
        """`GET /metrics`."""
        return PlainTextResponse(self.text(), media_type=_CONTENT_TYPE)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        with self._lock:
            found = dict(self._counters)
        found.update({(name, ()): value for name, value in self._gauges().items()})
        lines = []
        for name, help_ in _HELP.items():
            samples = sorted((labels, value) for (n, labels), value in found.items() if n == name)
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP dlp_edge_{name} {help_}", f"# TYPE dlp_edge_{name} {kind}"]
            lines += [
                f"dlp_edge_{name}{_written(labels)} {value:.10g}" for labels, value in samples
            ]
        return "\n".join(lines) + "\n"


class Observed:
    """ASGI middleware that counts and logs every request, also those that are refused."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, started, status = _Record(), perf_counter(), 499  # nginx': the client went away
        token = _record.set(record)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            _record.reset(token)
            seconds = perf_counter() - started
            self._count(scope, status, seconds, record.reply)
            log.info(json.dumps(_line(scope, status, seconds, record.reply)))

    def _count(self, scope: Scope, status: int, seconds: float, reply: Reply | None) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"
        self._metrics.add("requests_total", path=path, status=str(status))
        self._metrics.add("request_seconds_total", seconds, path=path)
        if reply is not None:
            self._metrics.add_reply(reply)


def _line(scope: Scope, status: int, seconds: float, reply: Reply | None) -> dict[str, Any]:
    """What the log says about a request."""
    line = {
        "time": round(time(), 3),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
    }
    if reply is not None:
        line |= {
            "prompt_tokens": reply.usage.prompt_tokens,
            "cached_tokens": reply.usage.cached_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "first_token": round(reply.timings.first_token, 4),
            "finish_reason": reply.finish_reason,
            "fusions": [sentence.fusion for sentence in reply.sentences],
        }
    return line


def _written(labels: _Labels) -> str:
    """Labels as Prometheus has them; nothing if there are none."""
    if not labels:
        return ""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels) + "}"
