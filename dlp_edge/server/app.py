"""The ASGI application: its routes, and what an error becomes."""

from __future__ import annotations

import time
from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dlp_edge.runtime.runtime import Runtime
from dlp_edge.server.access_middleware import Access, Guard
from dlp_edge.server.answering import Answering
from dlp_edge.server.body import drain
from dlp_edge.server.chat_request import Models
from dlp_edge.server.http_errors import HttpError
from dlp_edge.server.interfaces.completions import COMPLETIONS
from dlp_edge.server.interfaces.interface import CHAT
from dlp_edge.server.interfaces.responses import RESPONSES
from dlp_edge.server.metrics import Observed
from dlp_edge.server.openai_schema import Document, model_document
from dlp_edge.server.pages import page_routes

INTERFACES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
}


def models_of(runtime: Runtime) -> Models:
    """Model name -> the `adapters` option that it stands for: `auto` routes (where the bundle has
    a router), `base` is the base model, each adapter's name pins it. An adapter called auto or
    base is reached by the request's `dlp_edge.adapters`."""
    models: dict[str, str | Mapping[str, float] | None] = {"base": {}}
    if any(adapter.routed for adapter in runtime.adapters):
        models = {"auto": None, **models}
    for adapter in runtime.adapters:
        models.setdefault(adapter.name, adapter.name)
    return models


def build_app(runtime: Runtime, answering: Answering, models: Models, access: Access) -> Starlette:
    """The application for a runtime whose requests `answering` serves."""
    created = int(time.time())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    adapters = {adapter.name: adapter for adapter in runtime.adapters}

    def describe(name: str) -> Document:
        pinned = models[name]
        return model_document(name, created, adapters[pinned] if isinstance(pinned, str) else None)

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [describe(name) for name in models]})

    async def refuse_embeddings(request: Request) -> Response:
        await drain(request.receive)
        what = "Embeddings are not served: a bundle's graph gives logits, no hidden states."
        return HttpError(501, what, code="not_supported").response()

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in models:
            what = f"The model {name!a} does not exist."
            return HttpError(404, what, "model", "model_not_found").response()
        return JSONResponse(describe(name))

    middleware = [Middleware(Guard, access)]
    if access.origins:  # outside the guard, so that an allowed page can read a refusal
        cors = Middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    middleware.insert(0, Middleware(Observed, answering.metrics))  # outermost: it sees refusals
    return Starlette(
        routes=[
            *page_routes(),
            Route("/health", health),
            Route("/metrics", answering.metrics.endpoint),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/v1/embeddings", refuse_embeddings, methods=["POST"]),
            *(
                Route(path, answering.endpoint(interface), methods=["POST"])
                for path, interface in INTERFACES.items()
            ),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refuse_path},
    )


async def _refuse_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = f"{request.method} {request.url.path!a} is not served here."
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else None
    return HttpError(status, what, headers=headers).response()
