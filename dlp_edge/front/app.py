"""The ASGI application of a front: its routes, and what an error becomes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dlp_edge.bundle.manifest import RouterManifest
from dlp_edge.front.answering import FrontAnswering
from dlp_edge.front.fusion_name import BASE
from dlp_edge.front.metrics import Metrics
from dlp_edge.front.pool import UpstreamPool
from dlp_edge.server.access_middleware import Access, Guard
from dlp_edge.server.chat_request import Models
from dlp_edge.server.http_errors import HttpError
from dlp_edge.server.openai_schema import model_document

METRICS_TYPE = "text/plain; version=0.0.4"


def models_of(manifest: RouterManifest) -> Models:
    """Model name -> the `adapters` option that it stands for, as `dlp-edge serve` has them."""
    models: dict[str, str | Mapping[str, float] | None] = {BASE: {}}
    if manifest.router is not None:
        models = {"auto": None, **models}
    for adapter in manifest.adapters:
        models.setdefault(adapter.name, adapter.name)
    return models


def build_app(
    answering: FrontAnswering,
    models: Models,
    pool: UpstreamPool,
    metrics: Metrics,
    access: Access,
) -> Starlette:
    """The application whose requests `answering` serves. None of vLLM's own endpoints is among
    its routes: clients cannot load or unload adapters."""
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()

    async def health(request: Request) -> Response:
        well = sum(upstream.is_up for upstream in pool.upstreams)
        document = {
            "status": "ok" if well else "unavailable",
            "upstreams": {"well": well, "all": len(pool.upstreams)},
        }
        return JSONResponse(document, 200 if well else 503)

    async def show_metrics(request: Request) -> Response:
        return PlainTextResponse(metrics.text(_gauges(answering, pool)), media_type=METRICS_TYPE)

    async def list_models(request: Request) -> Response:
        data = [model_document(name, created) for name in models]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in models:
            what = f"The model {name!a} does not exist."
            return HttpError(404, what, "model", "model_not_found").response()
        return JSONResponse(model_document(name, created))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", show_metrics),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/v1/chat/completions", answering, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, access)],
        exception_handlers={HTTPException: _refuse_path},
        lifespan=lifespan,
    )


def _gauges(answering: FrontAnswering, pool: UpstreamPool) -> Iterator[tuple[str, str, float]]:
    yield "running", "", answering.queue.running
    yield "waiting", "", answering.queue.waiting
    for upstream in pool.upstreams:
        label = f'upstream="{upstream.url}"'
        yield "upstream_up", label, upstream.is_up
        yield "upstream_running", label, upstream.running


async def _refuse_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = f"{request.method} {request.url.path!a} is not served here."
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else None
    return HttpError(status, what, headers=headers).response()
