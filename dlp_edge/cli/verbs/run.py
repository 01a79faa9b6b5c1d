"""`dlp-edge run BUNDLE PROMPT`: answers one prompt."""

from __future__ import annotations

import argparse
import sys

from dlp_edge.cli import options, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="answer a prompt, showing which adapters wrote each sentence",
        description="Answers a prompt and shows each sentence with the adapters that wrote it and "
        "their weights.",
    )
    options.add_bundle(parser)
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    options.add_generation(parser)
    options.add_routing(parser)
    options.add_engine(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.cli.loading import open_runtime

    prompt = arguments.prompt
    if prompt == "-":
        prompt = sys.stdin.read().removeprefix("\ufeff")  # PowerShell writes a byte order mark
    request = options.request_options(arguments)
    with open_runtime(arguments) as runtime:
        stream = runtime.stream(prompt, **request)
        if arguments.json:
            output.print_json(output.reply_document(stream.finish()))
        else:
            output.print_sentences(stream, [adapter.name for adapter in runtime.adapters])
            if not arguments.quiet:
                output.print_speed(stream.reply)
    return 0
