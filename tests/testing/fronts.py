"""A front for tests, over fake or real servers, and the router folder that it reads."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from dlp_edge import __version__
from dlp_edge.bundle import files
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest import RouterManifest, ServedBackbone
from dlp_edge.bundle.router_folder import ROUTING, dump_routing, file_entries
from dlp_edge.front.answering import Limits
from dlp_edge.front.fusion_name import on_grid
from dlp_edge.front.serving import FrontServer, make_front
from dlp_edge.front.skills import RoutedSkills
from dlp_edge.runtime.options import Adapters
from dlp_edge.runtime.routing.router import Classification
from dlp_edge.server.access_middleware import Access
from dlp_edge.server.listening import listen, url_of
from dlp_edge.types import RouteDecision

MAX_SKILLS = 3
LABELS = ("sums", "sql", "email")  # of the tiny bundle


class FickleRouter:
    """Wants another fusion at nearly every sentence, whatever it says."""

    def classify(self, prompt: str, generated: str) -> Classification:
        rng = random.Random(f"{prompt}|{generated}")
        weights = [rng.random() ** 2 for _ in LABELS]
        total = sum(weights)
        shares = (weight / total for weight in weights)
        return Classification(dict(zip(LABELS, shares, strict=True)), 0.0)


def grid(decision: RouteDecision, generated: str) -> Adapters:
    """`on_route` of a Runtime that is to route as a front does."""
    return on_grid(decision.weights, MAX_SKILLS)


def make_router_folder(bundle: Path, folder: Path) -> Path:
    """The router folder of a bundle's export, without the rest of it."""
    opened = open_bundle(bundle)
    manifest, backbone = opened.manifest, opened.manifest.backbone
    router = folder / "router"
    router.mkdir(parents=True)
    names = (files.TOKENIZER, *(files.router_files(manifest.router) if manifest.router else ()))
    for name in names:
        (router / name).write_bytes(opened.read(files.file_name(manifest, name)))
    routing = RouterManifest(
        created_with=__version__,
        backbone=ServedBackbone(
            backbone.name,
            backbone.fingerprint,
            backbone.context_length,
            backbone.vocab_size,
            backbone.bos_token,
            backbone.eos_token,
            backbone.eos_token_ids,
        ),
        chat_template=manifest.chat_template,
        adapters=manifest.adapters,
        router=manifest.router,
        max_skills=MAX_SKILLS,
        max_rank=sum(adapter.rank for adapter in manifest.adapters),
        files=file_entries(router, manifest.router),
    )
    (router / ROUTING).write_text(dump_routing(routing), encoding="utf-8")
    return folder


class Fronted:
    """A front on a free port of loopback, on a thread of its own."""

    def __init__(self, skills: RoutedSkills, upstreams: Sequence[str], **options: Any) -> None:
        self.errors: list[Exception] = []
        access = Access(key=options.pop("key", None))
        silence, patience = options.pop("silence", 5.0), options.pop("patience", 0.5)
        sock = listen("127.0.0.1", 0, has_key=access.key is not None)
        self.url = url_of(sock)
        self.server: FrontServer = make_front(
            skills, upstreams, Limits(**options), access, silence, patience, self.errors.append
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]})
        self.thread.start()

    def client(self, key: str = "none", timeout: float = 60) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=timeout)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def fronted(skills: RoutedSkills, upstreams: Sequence[str], **options: Any) -> Iterator[Fronted]:
    front = Fronted(skills, upstreams, **options)
    try:
        yield front
    finally:
        front.stop()
