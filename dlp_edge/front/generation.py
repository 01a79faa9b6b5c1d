"""The life of an answer over HTTP: as `runtime.decoding.loop`, with vLLM as the engine.

A completion runs until the router wants another fusion at a sentence start; it is then dropped, and
another goes on from the token ids so far under the fusion's name. vLLM reads the history again
(`kv="recompute"`), except for what its prefix cache holds under that name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter
from typing import Any

from dlp_edge.front.fusion_name import name_of
from dlp_edge.front.metrics import Metrics
from dlp_edge.front.pool import UpstreamPool
from dlp_edge.front.upstream import Upstream, UpstreamLostError
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.loaded_bundle import MAX_SIDE_BY_SIDE
from dlp_edge.runtime.request import Decoding
from dlp_edge.types import Chunk

Chunks = AsyncGenerator[list[Chunk], None]
MOST_LOSSES = 3  # of an answer, which may be what fells the servers
SEEDS = 1 << 63


class Generation:
    """Generates answers to one request.

    Args:
        conversation: what decides which server takes it.
    """

    def __init__(
        self, pool: UpstreamPool, metrics: Metrics, decoding: Decoding, conversation: str
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._decoding = decoding
        self._conversation = conversation

    async def stream(self, answer: Answer | RequestAnswers) -> Chunks:
        """The chunks of what `RoutedSkills.prepare` gave.

        Raises:
            UpstreamLostError: MOST_LOSSES servers failed on it.
            UpstreamRefusedError: a server does not take it.
            HttpError: 503, no server is well.
        """
        answer.requested_at = perf_counter()
        chunks = self._one(answer) if isinstance(answer, Answer) else self._each(answer)
        async with aclosing(chunks) as pieces:
            async for piece in pieces:
                yield piece

    async def _one(self, answer: Answer) -> Chunks:
        fusion = await asyncio.to_thread(answer.begin)
        lost: Upstream | None = None  # the latest
        losses, waits = 0, "first_token_seconds"
        while not answer.done:
            upstream = await self._pool.choose(self._conversation, avoid=lost)
            segment = _Segment(answer, self._metrics, waits)
            body = _body(answer, fusion, self._decoding)
            try:
                async with aclosing(segment.run(upstream, body)) as pieces:
                    async for chunks in pieces:
                        yield chunks
            except UpstreamLostError:
                lost, losses, waits = upstream, losses + 1, "failover_seconds"
                self._pool.lost(upstream)
                self._metrics.count("failovers")
                if losses == MOST_LOSSES:
                    raise
            if segment.next_fusion is not None:
                fusion, waits = segment.next_fusion, "switch_seconds"
                read_again = len(answer.prompt_ids) + len(answer.tokens)
                self._metrics.count("recomputed_tokens", read_again)

    async def _each(self, answers: RequestAnswers) -> Chunks:
        """All answers side by side; their chunks in order."""
        arrived: asyncio.Queue[tuple[Answer, list[Chunk] | Exception | None]] = asyncio.Queue()

        async def run(answer: Answer) -> None:
            try:
                async with aclosing(self._one(answer)) as pieces:
                    async for chunks in pieces:
                        arrived.put_nowait((answer, chunks))
                arrived.put_nowait((answer, None))
            except Exception as error:
                arrived.put_nowait((answer, error))

        running: dict[Answer, asyncio.Task[None]] = {}
        try:
            while True:
                while len(running) < MAX_SIDE_BY_SIDE and (answer := answers.next_answer()):
                    running[answer] = asyncio.create_task(run(answer))
                if not running:
                    return
                answer, given = await arrived.get()
                if isinstance(given, Exception):
                    raise given
                if given is None:
                    del running[answer]
                answers.hold(answer, given or [])
                yield list(answers.due())
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)


class _Segment:
    """The part of an answer that one completion writes.

    Args:
        waits: the metric of its time to the first token.

    Attributes:
        next_fusion: what writes on, where that is a change.
    """

    def __init__(self, answer: Answer, metrics: Metrics, waits: str) -> None:
        self.next_fusion: dict[str, float] | None = None
        self._answer = answer
        self._metrics = metrics
        self._waits = waits
        self._begun = False

    async def run(self, upstream: Upstream, body: dict[str, Any]) -> Chunks:
        """The chunks, up to the end of the answer or of what this fusion writes of it."""
        answer, asked_at = self._answer, perf_counter()
        async with aclosing(upstream.complete(body)) as pieces:
            async for piece in pieces:
                if piece.ids:
                    self._record(perf_counter() - asked_at, len(piece.ids))
                for at, token in enumerate(piece.ids):
                    step = answer.accept(token)
                    self._metrics.count("tokens")
                    if step.chunks:
                        yield step.chunks
                    if answer.done or step.fusion is not None:
                        self.next_fusion = step.fusion
                        self._metrics.count("wasted_tokens", len(piece.ids) - at - 1)
                        return
                if piece.finish is not None:
                    yield answer.end("length" if piece.finish == "length" else "stop")
                asked_at = perf_counter()

    def _record(self, seconds: float, tokens: int) -> None:
        """Notes for how long the next tokens were waited for."""
        if self._begun:
            self._answer.record(decode=seconds, decode_steps=tokens)
            return
        self._begun = True
        self._metrics.observe(self._waits, seconds)
        if self._answer.tokens:
            self._answer.record(recompute=seconds)
        else:
            self._answer.record(prefill=seconds)


def _body(answer: Answer, fusion: dict[str, float], decoding: Decoding) -> dict[str, Any]:
    """The completion request that goes on with an answer.

    A seed counts from the tokens so far, or each part of the answer would draw the same numbers.
    """
    body: dict[str, Any] = {
        "model": name_of(fusion),
        "prompt": [*answer.prompt_ids, *answer.tokens],
        "max_tokens": answer.limit - len(answer.tokens),
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty,
        "stream": True,
        "return_token_ids": True,
    }
    seed = answer.reply().seed
    if seed is not None:
        body["seed"] = (seed + len(answer.tokens)) % SEEDS
    return body
