"""The socket, and the server library that runs the application on it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.server.answering import Answering
from dlp_edge.server.connection import Connection

GRACE = 5.0  # seconds in which the answers under way may end by themselves when the server stops
LAST_SECONDS = 10  # after which a client that takes or sends nothing is cut off
IDLE_CONNECTIONS = 100  # besides those that wait for an answer; more than `MAX_IDLE`


def listen(host: str, port: int, has_key: bool) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: there is no such host or port, or others could reach it without a key.
        ResourceError: the port is in use, or not allowed.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"the port is {port}", "Choose 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"there is no host {host!r}", "Use 127.0.0.1") from error
    family, _, _, _, address = found[0]
    name = str(address[0])
    if not ipaddress.ip_address(name.partition("%")[0]).is_loopback and not has_key:
        raise UsageError(
            f"other machines can reach {host}", "Set a key (DLP_EDGE_KEY), or use 127.0.0.1"
        )
    try:
        return socket.create_server((name, port), family=family)
    except OSError as error:
        raise ResourceError(
            f"{host}:{port} cannot be listened on ({error.strerror})",
            "Choose another --port, or 0 for a free one",
        ) from error


def url_of(sock: socket.socket) -> str:
    """The address that clients are given as base URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def uvicorn_config(
    app: ASGIApp, lifespan: Literal["on", "off"], requests: int, grace: int
) -> uvicorn.Config:
    """How a server talks HTTP.

    Args:
        requests: how many may be answered or wait for their answer.
        grace: seconds for which answers under way may go on at the end.
    """
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        log_level="critical",  # the application reports its errors itself
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=requests + IDLE_CONNECTIONS,
        timeout_graceful_shutdown=grace,
    )


class Server(uvicorn.Server):
    """Answers until ctrl-C or SIGTERM, whose usual effect then follows.

    Args:
        requests: how many may be answered or wait for their answer.
    """

    def __init__(self, app: ASGIApp, answering: Answering, requests: int) -> None:
        config = uvicorn_config(app, "off", requests, LAST_SECONDS)
        super().__init__(config)
        self._answering = answering

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the answers under way, but not for ever."""
        ending = asyncio.create_task(self._answering.stop(GRACE))
        await super().shutdown(sockets)
        ending.cancel()
