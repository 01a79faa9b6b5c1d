"""The vLLM servers behind a front: which one takes a conversation, and which are well."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence

from dlp_edge.front.upstream import Upstream
from dlp_edge.server.http_errors import HttpError

CHECK_SECONDS = 1.0
POLL_SECONDS = 0.1
SLACK = 1.25  # of the mean load, up to which a server takes its own conversations


class UpstreamPool:
    """Chooses among the servers that are well.

    A conversation stays with one server (rendezvous hashing), whose prefix cache holds its history;
    only when that one has SLACK times its share of the load does the next in line take it.

    Args:
        patience: seconds that an answer waits for any server to be well.
    """

    def __init__(self, upstreams: Sequence[Upstream], patience: float) -> None:
        self.upstreams = tuple(upstreams)
        self._patience = patience
        self._checks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Asks each server once, and then again and again."""
        await asyncio.gather(*(upstream.check() for upstream in self.upstreams))
        self._checks = {asyncio.create_task(self._watch(each)) for each in self.upstreams}

    async def stop(self) -> None:
        """Ends the asking."""
        tasks = list(self._checks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def lost(self, upstream: Upstream) -> None:
        """Takes a server that failed out of the choice until it says that it is well."""
        upstream.is_up = False
        task = asyncio.create_task(upstream.check())
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def choose(self, conversation: str, avoid: Upstream | None = None) -> Upstream:
        """The server for a conversation.

        Args:
            avoid: taken only if there is no other.

        Raises:
            HttpError: 503, none is well.
        """
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            well = [upstream for upstream in self.upstreams if upstream.is_up]
            others = [upstream for upstream in well if upstream is not avoid]
            if others or well:
                return _preferred(conversation, others or well)
            if asyncio.get_running_loop().time() >= deadline:
                raise HttpError(
                    503,
                    "No server is well at present. Try again later.",
                    code="no_upstream",
                    headers={"Retry-After": "5"},
                )
            await asyncio.sleep(POLL_SECONDS)

    @staticmethod
    async def _watch(upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await upstream.check()


def _preferred(conversation: str, upstreams: Sequence[Upstream]) -> Upstream:
    load = sum(upstream.running for upstream in upstreams) + 1
    most = math.ceil(SLACK * load / len(upstreams))
    in_line = sorted(upstreams, key=lambda upstream: _rank(conversation, upstream.url))
    return next(upstream for upstream in in_line if upstream.running < most)


def _rank(conversation: str, url: str) -> bytes:
    return hashlib.sha256(f"{conversation}\n{url}".encode()).digest()
