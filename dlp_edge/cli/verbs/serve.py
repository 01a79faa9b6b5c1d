"""`dlp-edge serve BUNDLE`: an OpenAI-compatible server for applications in other languages."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import require_extra

if TYPE_CHECKING:
    from socket import socket

    from dlp_edge.runtime.runtime import Runtime
    from dlp_edge.server.access_middleware import Access
    from dlp_edge.server.answering import Limits


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer OpenAI's chat requests over HTTP, with a page to chat on",
        description="Serves OpenAI's interface below /v1 and a page to chat on at /. Model names: "
        "auto (routed), base, and each adapter. Prints its address once it is ready.",
    )
    options.add_bundle(parser)
    group = options.add_server(parser)
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin that may call it, such as https://example.org",
    )
    count = options.whole_number
    group.add_argument(
        "--max-parallel",
        type=count(1),
        default=16,
        metavar="N",
        help="requests that are answered side by side (16)",
    )
    group.add_argument(
        "--prefix-cache",
        type=count(0),
        default=256 << 20,
        metavar="BYTES",
        help="memory for prefixes that requests share (256 MiB); 0 keeps none",
    )
    group.add_argument(
        "--log-requests", action="store_true", help="a JSON line per request on standard error"
    )
    group.add_argument(
        "--max-waiting", type=count(0), default=16, metavar="N", help="queue size; beyond it 429"
    )
    options.add_engine(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra("serve"):
        from dlp_edge.server.access_middleware import Access
        from dlp_edge.server.answering import Limits
        from dlp_edge.server.listening import listen, url_of
        from dlp_edge.server.metrics import log_requests
    from dlp_edge.cli.loading import open_runtime

    if arguments.log_requests:
        log_requests()
    access = Access(
        hosts=frozenset(name.lower() for name in arguments.allow_host),
        origins=frozenset(arguments.allow_origin),
        key=arguments.key or os.environ.get("DLP_EDGE_KEY") or None,
    )
    limits = Limits(
        body=arguments.max_body,
        messages=arguments.max_messages,
        parallel=arguments.max_parallel,
        waiting=arguments.max_waiting,
        new_tokens=arguments.max_context,
    )
    # The port first: whether it is free is known at once, loading takes a while.
    with (
        listen(arguments.host, arguments.port, access.key is not None) as sock,
        open_runtime(
            arguments, max_parallel=arguments.max_parallel, prefix_cache=arguments.prefix_cache
        ) as runtime,
    ):
        url = url_of(sock)

        def announce(models: Iterable[str]) -> None:
            if arguments.json:  # on one line: a program reads it while the server runs on
                print(json.dumps({"url": url, "models": list(models)}), flush=True)
            else:
                print(url, flush=True)

        serve_on(sock, runtime, access, limits, announce)
    return 0


def serve_on(
    sock: socket,
    runtime: Runtime,
    access: Access,
    limits: Limits,
    announce: Callable[[Iterable[str]], None],
) -> None:
    """Serves a Runtime until ctrl-C or SIGTERM.

    Args:
        announce: called with the models once all is ready.
    """
    from dlp_edge.server.answering import Answering
    from dlp_edge.server.app import build_app, models_of
    from dlp_edge.server.listening import Server

    models = models_of(runtime)
    answering = Answering(runtime, models, limits, _report)
    app = build_app(runtime, answering, models, access)
    announce(models)
    Server(app, answering, limits.parallel + limits.waiting).run(sockets=[sock])


def _report(error: Exception) -> None:
    """Logs an unexpected error; the client gets a generic 500."""
    if os.environ.get("DLP_EDGE_TRACEBACK"):
        traceback.print_exception(error)
    output.note(f"error: internal error: {type(error).__name__}: {error}")
