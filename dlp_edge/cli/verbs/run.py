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
        "their weights; in a pipe, the text alone.",
    )
    options.add_bundle(parser)
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,
        help="the text alone, without adapters (default: where the output is no terminal)",
    )
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
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages.append({"role": "user", "content": prompt})
    plain = not sys.stdout.isatty() if arguments.plain is None else arguments.plain
    with open_runtime(arguments) as runtime:
        stream = runtime.stream(messages, **request)
        if arguments.json:
            output.print_json(output.reply_document(stream.finish()))
            return 0
        if plain:
            output.print_text(stream)
        else:
            output.print_sentences(stream, [adapter.name for adapter in runtime.adapters])
        if not arguments.quiet:
            output.print_speed(stream.reply)
    return 0
