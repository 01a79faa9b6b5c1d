"""`dlp-edge completion SHELL`: the script that lets a shell complete verbs and options."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import require_extra

SHELLS = ("bash", "zsh", "fish", "powershell", "tcsh")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Prints a completion script. For bash: "
        'eval "$(dlp-edge completion bash)" in ~/.bashrc.',
    )
    parser.add_argument("shell", choices=SHELLS)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra("completion"):
        import shtab

    _complete_paths(arguments.parser, shtab.FILE)
    script = shtab.complete(arguments.parser, arguments.shell)
    if arguments.json:
        output.print_json({"shell": arguments.shell, "script": script})
    else:
        print(script)
    return 0


def _complete_paths(parser: argparse.ArgumentParser, how: object) -> None:
    """Marks all arguments that are paths, the verbs' too, as shtab wants it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_paths(verb, how)
        elif action.type is Path:
            action.complete = how  # type: ignore[attr-defined]
