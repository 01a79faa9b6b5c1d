"""dlp-edge's server as a Ray Serve application: replicas of one bundle on a fleet of CPU machines.

serve run edge:app bundle=/data/bundle max_replicas=8
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from dlp_edge import Runtime
from dlp_edge.server.access_middleware import Access
from dlp_edge.server.answering import Answering, Limits
from dlp_edge.server.app import build_app, models_of

STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_log = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """What `serve run edge:app NAME=VALUE` takes.

    Attributes:
        bundle: a folder that every node has, or a hub id or URL: each node then fetches one copy
            into its cache, which its replicas share.
        threads: cores of a replica.
        ongoing: requests that a replica has at a time; more replicas come when the mean is above.
        queued: requests that wait beyond those; the next one gets status 503.
        replicas_per_node: at most so many, as memory allows; 0 is no limit.
        sticky: keep requests with the same X-Session-Id header on one replica.
        hosts: names that clients use for this service.
    """

    bundle: str
    threads: int = 1
    max_context: int = 4096
    min_replicas: int = 1
    max_replicas: int = 4
    ongoing: int = 1
    queued: int = 64
    replicas_per_node: int = 0
    sticky: bool = False
    hosts: list[str] = []
    upscale_seconds: float = 5.0
    downscale_seconds: float = 120.0


@serve.ingress()
class Edge:
    """A replica: one Runtime and the server's application around it."""

    def __init__(self, settings: Settings) -> None:
        options: Any = {"threads": settings.threads, "max_context": settings.max_context}
        local = Path(settings.bundle).is_dir()
        source = settings.bundle
        self._runtime = Runtime(source, **options) if local else Runtime.from_hub(source, **options)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        models = models_of(self._runtime)
        limits = Limits(waiting=self._settings.ongoing, new_tokens=self._settings.max_context)
        answering = Answering(self._runtime, models, limits, _report)
        access = Access(
            hosts=frozenset(name.lower() for name in self._settings.hosts),
            key=os.environ.get("DLP_EDGE_KEY") or None,
        )
        return build_app(self._runtime, answering, models, access)

    def check_health(self) -> None:
        """Asked by Ray every few seconds; a replica that fails three times is replaced."""
        self._runtime.route("Is anybody there?")


def app(settings: Settings) -> serve.Application:
    """The application; Ray reads the settings from the command line or a config file."""
    autoscaling = AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.ongoing,
        upscale_delay_s=settings.upscale_seconds,
        downscale_delay_s=settings.downscale_seconds,
    )
    options: dict[str, Any] = {}
    if settings.replicas_per_node:
        options["max_replicas_per_node"] = settings.replicas_per_node
    if settings.sticky:
        options["request_router_config"] = RequestRouterConfig(request_router_class=STICKY)
    deployment = serve.deployment(
        Edge,
        name="edge",
        autoscaling_config=autoscaling,
        # One more than it works on, so that the next request is there when one ends.
        max_ongoing_requests=settings.ongoing + 1,
        max_queued_requests=settings.queued,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
        ray_actor_options={"num_cpus": settings.threads},
        **options,
    )
    return deployment.bind(settings)


def _report(error: Exception) -> None:
    """Logs what went wrong; the client gets a generic 500."""
    _log.error("internal error: %s: %s", type(error).__name__, error)
