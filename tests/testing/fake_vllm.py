"""A vLLM server for tests: its completions come from a bundle's own engine, its faults on order."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import uvicorn
from dlp_edge_vllm.names import GRID, parse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dlp_edge import Runtime
from dlp_edge.runtime.decoding.engine import make_engine
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.server.listening import listen


@dataclass
class Fault:
    """What happens to one completion.

    Attributes:
        after: tokens that it still gives.
        kind: "break" the connection, an "error" event, a "silence", or a "status" instead.
    """

    kind: str
    after: int = 0
    status: int = 500


@dataclass
class Completion:
    """A completion that was asked for.

    Attributes:
        given: tokens that were sent.
        aborted: the client closed it before its end.
    """

    body: dict[str, Any]
    given: int = 0
    aborted: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=perf_counter)

    @property
    def fusion(self) -> str:
        return str(self.body["model"])


class FakeVllm:
    """Serves /v1/completions and /health on a free port of loopback.

    Attributes:
        faults: taken by the next completions, one each.
        pace: seconds between tokens.
        at_once: tokens an event.
        is_well: what /health says.
        completions: all that were asked for.
    """

    def __init__(self, runtime: Runtime) -> None:
        loaded = runtime._loaded
        assert loaded is not None
        self._loaded = loaded
        self.faults: deque[Fault | None] = deque()
        self.pace = 0.0
        self.at_once = 1
        self.is_well = True
        self.completions: list[Completion] = []
        app = Starlette(
            routes=[
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/health", self._health),
            ]
        )
        sock = listen("127.0.0.1", 0, has_key=False)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]})
        self._thread.start()

    def stop(self) -> None:
        """As a killed process: connections break."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_well else 503)

    async def _complete(self, request: Request) -> Response:
        completion = Completion(await request.json())
        self.completions.append(completion)
        fault = self.faults.popleft() if self.faults else None
        names = {adapter.name for adapter in self._loaded.manifest.adapters}
        weights = {} if completion.fusion == "base" else parse(completion.fusion, names)
        if weights is None:
            error = {"message": f"The model {completion.fusion} does not exist."}
            return JSONResponse({"error": error}, 404)
        if fault is not None and fault.kind == "status":
            return JSONResponse({"error": {"message": "out of order"}}, fault.status)
        fusion = {name: steps / GRID for name, steps in weights.items()}
        events = self._events(completion, fusion, fault)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self, completion: Completion, fusion: dict[str, float], fault: Fault | None
    ) -> AsyncIterator[str]:
        ends = self._loaded.vocabulary.eos_token_ids
        try:
            tokens = self._tokens(completion.body["prompt"], fusion)
            ids: list[int] = []
            finish = None
            while finish is None:
                if fault is not None and completion.given + len(ids) >= fault.after:
                    if fault.kind == "error":
                        yield _event({"error": {"message": "engine died", "code": 500}})
                        return
                    if fault.kind == "silence":
                        await asyncio.sleep(30)
                    raise ConnectionError("the fake breaks off")
                ids.append(await asyncio.to_thread(next, tokens))
                if ids[-1] in ends:
                    finish = "stop"
                elif completion.given + len(ids) == completion.body["max_tokens"]:
                    finish = "length"
                if finish or len(ids) == self.at_once:
                    completion.given += len(ids)
                    yield _event({"choices": [{"token_ids": ids, "finish_reason": finish}]})
                    ids = []
                    await asyncio.sleep(self.pace)
            yield "data: [DONE]\n\n"
        except (GeneratorExit, asyncio.CancelledError):
            completion.aborted = True
            raise
        finally:
            completion.done.set()

    def _tokens(self, prompt: list[int], fusion: dict[str, float]) -> Iterator[int]:
        """Greedy tokens, for ever."""
        loaded = self._loaded
        room = loaded.engine.decoder.max_context
        engine = make_engine(loaded.backbone, loaded.stack, room)
        interrupt = Interrupt()
        engine.fuse(fusion)
        logits, _ = engine.prefill(prompt, 0, interrupt)
        while True:
            token = int(logits.argmax())
            yield token
            logits = engine.decoder.step([token], interrupt)[0]


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


@contextmanager
def fake_vllms(runtime: Runtime, count: int) -> Iterator[list[FakeVllm]]:
    fakes = [FakeVllm(runtime) for _ in range(count)]
    try:
        yield fakes
    finally:
        for fake in fakes:
            if fake._thread.is_alive():
                fake.stop()
