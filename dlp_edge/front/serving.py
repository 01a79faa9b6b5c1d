"""Puts a front together, and runs it on a listening socket."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import uvicorn
from starlette.types import ASGIApp

from dlp_edge.front.answering import FrontAnswering, Limits
from dlp_edge.front.app import build_app, models_of
from dlp_edge.front.metrics import Metrics
from dlp_edge.front.pool import UpstreamPool
from dlp_edge.front.queue import FrontQueue
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.front.upstream import Upstream
from dlp_edge.server.access_middleware import Access
from dlp_edge.server.listening import uvicorn_config

GRACE_SECONDS = 30  # in which the answers under way may end when the front stops


class FrontServer(uvicorn.Server):
    """Answers until ctrl-C or SIGTERM; then it takes nothing new, and ends what is under way.

    Attributes:
        pool: the servers behind it.
    """

    def __init__(self, app: ASGIApp, pool: UpstreamPool, queue: FrontQueue, limits: Limits) -> None:
        requests = limits.running + limits.waiting
        config = uvicorn_config(app, "on", requests, GRACE_SECONDS)
        super().__init__(config)
        self.pool = pool
        self._queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.closed = True
        await super().shutdown(sockets)


def make_front(
    skills: RoutedSkills,
    upstreams: Sequence[str],
    limits: Limits,
    access: Access,
    silence: float,
    patience: float,
    on_error: Callable[[Exception], None],
) -> FrontServer:
    """A server that has not begun; see `serve_front`."""
    # A proxy of the environment is for the way out, not for servers behind this one.
    client = httpx2.AsyncClient(
        trust_env=False, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    )
    pool = UpstreamPool([Upstream(url, client, silence) for url in upstreams], patience)
    metrics = Metrics()
    models = models_of(skills.manifest)
    answering = FrontAnswering(skills, models, pool, metrics, limits, on_error)
    app = build_app(answering, models, pool, metrics, access)
    return FrontServer(app, pool, answering.queue, limits)


def serve_front(
    folder: Path,
    upstreams: Sequence[str],
    sock: socket.socket,
    max_context: int,
    limits: Limits,
    access: Access,
    silence: float,
    patience: float,
    on_ready: Callable[[list[str]], None],
    on_error: Callable[[Exception], None],
) -> None:
    """Serves the router folder of an export until the process is told to stop.

    Args:
        upstreams: the URLs of the vLLM servers.
        max_context: tokens of prompt and answer together, as the servers are started for.
        silence: seconds without a token after which a server counts as lost.
        patience: seconds that an answer waits while no server is well.
        on_ready: called with the models' names, once the folder is loaded.

    Raises:
        BundleError: the folder is missing or damaged.
    """
    skills = RoutedSkills.load(folder, max_context)
    server = make_front(skills, upstreams, limits, access, silence, patience, on_error)
    on_ready(list(models_of(skills.manifest)))
    server.run(sockets=[sock])
