"""The chat page and the description of the interface: what a browser may have without a key.

All of it is files of this package, the same for everybody. The page itself sends the key with
every request that it makes.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dlp_edge.server.openapi import openapi_document

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FOLDER = files("dlp_edge.server") / "page"
_PLACEHOLDER = "<!-- paths -->"


def page_routes() -> list[Route]:
    """What needs no key, by path."""
    content = {
        item.name: item.read_bytes()
        for item in _FOLDER.iterdir()
        if item.name.rpartition(".")[2] in _TYPES
    }
    document = openapi_document()
    reference = content["docs.html"].decode().replace(_PLACEHOLDER, _listed(document))

    def show(name: str, body: bytes) -> Any:
        async def answer(request: Request) -> Response:
            return Response(body, headers=HEADERS, media_type=_TYPES[name.rpartition(".")[2]])

        return answer

    async def describe(request: Request) -> Response:
        return JSONResponse(document, headers=HEADERS)

    return [
        Route("/", show("index.html", content["index.html"])),
        Route("/docs", show("docs.html", reference.encode())),
        Route("/openapi.json", describe),
        *(
            Route(f"/page/{name}", show(name, body))
            for name, body in content.items()
            if not name.endswith(".html")
        ),
    ]


def _listed(document: dict[str, Any]) -> str:
    """The paths of an OpenAPI document as rows of a table."""
    return "\n".join(
        f"<tr><th scope='row'><code>{method.upper()} {escape(path)}</code></th>"
        f"<td>{escape(operation['summary'])}</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
