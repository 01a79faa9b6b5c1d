"""`dlp-edge add BUNDLE NAME=DIR --examples FILE`: a new skill for a finished bundle."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.signing import read_signature
from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import parse_named_folders
from dlp_edge.tasks.samples import read_samples


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "add",
        help="add an adapter to a bundle and fit the router for it",
        description="Packs a PEFT adapter into the bundle, in place, and fits the router on "
        "examples, in seconds and without torch. A loaded Runtime sees it when it loads again.",
    )
    options.add_bundle(parser)
    parser.add_argument("adapter", metavar="NAME=DIR", help="its name and PEFT folder")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help='10 to 100 lines of {"prompt", "response"?}; without, it can only be pinned',
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.runtime.adapters.edit import add_skill
    from dlp_edge.runtime.routing.policy import load_router

    ((name, folder),) = parse_named_folders([arguments.adapter]).items()
    samples = read_samples(arguments.examples, response_needed=False) if arguments.examples else ()
    begun = time.perf_counter()
    signed = read_signature(arguments.bundle) is not None
    examples = [asdict(sample) for sample in samples]

    def change(bundle: Bundle) -> Bundle:
        return add_skill(bundle, load_router(bundle), name, folder, examples)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = read_current(arguments.bundle, change)
    remarks = [str(warning.message) for warning in caught]
    seconds = round(time.perf_counter() - begun, 2)
    routed = bool(examples)
    if not routed and not arguments.quiet:
        output.note(f"note: {name} can be pinned but is never routed to; give --examples for that")
    if not arguments.quiet:
        for remark in remarks:
            output.note(f"note: {remark}")
    if signed and not arguments.quiet:
        output.note("note: the bundle was signed; sign it again")
    if arguments.json:
        names = [entry.name for entry in after.manifest.adapters]
        document = {"added": name, "routed": routed, "adapters": names, "remarks": remarks}
        output.print_json({**document, "seconds": seconds})
        return 0
    print(f"added    {name}{'' if routed else ' (pinned only)'}")
    print(f"time     {seconds:.1f} s, {len(examples)} examples")
    return 0
