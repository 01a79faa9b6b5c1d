"""`dlp-edge remove BUNDLE NAME`: takes a skill out of a bundle."""

from __future__ import annotations

import argparse

from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.signing import read_signature
from dlp_edge.cli import options, output


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("remove", help="remove an adapter from a bundle")
    options.add_bundle(parser)
    parser.add_argument("name", help="the adapter")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.runtime.adapters.edit import remove_skill
    from dlp_edge.runtime.routing.policy import load_router

    signed = read_signature(arguments.bundle) is not None

    def change(bundle: Bundle) -> Bundle:
        return remove_skill(bundle, load_router(bundle), arguments.name)

    after = read_current(arguments.bundle, change)
    if signed and not arguments.quiet:
        output.note("note: the bundle was signed; sign it again")
    if arguments.json:
        names = [entry.name for entry in after.manifest.adapters]
        output.print_json({"removed": arguments.name, "adapters": names})
        return 0
    print(f"removed  {arguments.name}")
    return 0
