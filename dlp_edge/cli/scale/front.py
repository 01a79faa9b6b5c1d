"""`dlp-edge front DIR --upstream URL`: the skills of an export on vLLM servers."""

from __future__ import annotations

import argparse
import json
import os
import traceback
from pathlib import Path
from urllib.parse import urlsplit

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import require_extra
from dlp_edge.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "front",
        help="route requests sentence by sentence over vLLM servers",
        description="Serves OpenAI's chat requests like `serve`, with vLLM servers as the engine. "
        "Needs router/ of an `export --to vllm` only. Prints its address once it is ready.",
    )
    parser.add_argument("folder", type=Path, help="folder from export --to vllm")
    parser.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="URL",
        help="a vLLM server, such as http://127.0.0.1:8000; repeatable",
    )
    count = options.whole_number
    group = options.add_server(parser)
    group.add_argument("--max-context", type=count(1), default=4096, metavar="TOKENS")
    group.add_argument(
        "--max-running", type=count(1), default=64, metavar="N", help="requests at a time (64)"
    )
    group.add_argument(
        "--max-waiting", type=count(0), default=64, metavar="N", help="queue size; beyond it 429"
    )
    group.add_argument(
        "--silence",
        type=count(1),
        default=60,
        metavar="SECONDS",
        help="without a token, after which a server counts as lost (60)",
    )
    group.add_argument(
        "--patience",
        type=count(0),
        default=30,
        metavar="SECONDS",
        help="for which an answer waits while no server is well (30)",
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra("front"):
        from dlp_edge.front.answering import Limits
        from dlp_edge.front.serving import serve_front
        from dlp_edge.server.access_middleware import Access
        from dlp_edge.server.listening import listen, url_of

    for url in arguments.upstream:
        _check_url(url)
    access = Access(
        hosts=frozenset(name.lower() for name in arguments.allow_host),
        key=arguments.key or os.environ.get("DLP_EDGE_KEY") or None,
    )
    limits = Limits(
        body=arguments.max_body,
        messages=arguments.max_messages,
        running=arguments.max_running,
        waiting=arguments.max_waiting,
    )
    with listen(arguments.host, arguments.port, access.key is not None) as sock:

        def ready(models: list[str]) -> None:
            url = url_of(sock)
            # On one line: a program reads it while the server runs on.
            print(json.dumps({"url": url, "models": models}) if arguments.json else url, flush=True)

        serve_front(
            arguments.folder,
            arguments.upstream,
            sock,
            max_context=arguments.max_context,
            limits=limits,
            access=access,
            silence=arguments.silence,
            patience=arguments.patience,
            on_ready=ready,
            on_error=_report,
        )
    return 0


def _check_url(url: str) -> None:
    """Raises UsageError unless it is the URL of an HTTP server."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--upstream {url!r} is no URL", "Write http://HOST:PORT")


def _report(error: Exception) -> None:
    """Logs what went wrong; the client gets a generic answer."""
    if os.environ.get("DLP_EDGE_TRACEBACK"):
        traceback.print_exception(error)
    output.note(f"error: {type(error).__name__}: {error}")
