"""Who may talk to the server: checks on Host, Origin and key before anything else is read.

A server on loopback is still within reach of every web page that the user opens. A page can make
its own name point to 127.0.0.1 (DNS rebinding), which the Host header gives away, or post to the
address outright, which the Origin header gives away.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dlp_edge.server.body import drain
from dlp_edge.server.http_errors import HttpError

# What is read of a refused request, so that a small one gets its answer; the connection ends then.
REFUSED_BYTES = 64 << 10
REFUSED_SECONDS = 0.5
PUBLIC = ("/", "/health", "/docs", "/openapi.json")
_HOST = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})))(?::\d{1,5})?"
)


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes:
        hosts: names that the Host header may have besides localhost and IP addresses, to which
            no one can point another name.
        origins: web pages that may use the server, as `https://example.org`; programs send no
            Origin.
        key: what `Authorization: Bearer` must carry; None asks for none.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    key: str | None = field(default=None, repr=False)


class Guard:
    """ASGI middleware that answers 401 or 403 itself and passes all else on."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._refusal(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        await drain(receive, REFUSED_BYTES, REFUSED_SECONDS)
        response = problem.response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not _is_own_name(host, self._access.hosts):
            return HttpError(403, f"The host {host!a} is not allowed. Allow it with --allow-host.")
        own = {f"http://{host}", f"https://{host}"}  # of the page at /, also behind a TLS proxy
        if origin is not None and origin not in self._access.origins | own:
            return HttpError(
                403, f"Pages of {origin!a} are not allowed. Allow them with --allow-origin."
            )
        if self._access.key is None or _is_public(scope["path"]):
            return None
        if not _carries(headers.get("authorization", ""), self._access.key):
            return HttpError(
                401,
                "The API key is missing or wrong. Send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None


def _is_public(path: str) -> bool:
    """Whether a path needs no key: it shows nothing of the bundle, and asks nothing of it."""
    return path in PUBLIC or path.startswith("/page/")


def _is_own_name(host: str, allowed: frozenset[str]) -> bool:
    """Whether a Host header ("localhost:8080", "[::1]:8080") names this server."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    address, name = match.groups()
    if name is not None and (name.lower() == "localhost" or name.lower() in allowed):
        return True
    try:
        ipaddress.IPv6Address(address) if name is None else ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def _carries(authorization: str, key: str) -> bool:
    """Compares in a time that tells nothing about the key."""
    scheme, _, given = authorization.partition(" ")
    same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
    return same and scheme.lower() == "bearer"
