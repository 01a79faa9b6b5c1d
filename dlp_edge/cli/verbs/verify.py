"""`dlp-edge verify BUNDLE [--key PUBLIC]`: is a bundle whole, well-formed, and from whom?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from dlp_edge.bundle.signing import TrustedKey
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.cli import options, output

SIGNATURES = {
    "good": "good, by the key",
    "present": "there, not checked: give --key",
    "none": "none",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check a bundle, without loading it",
        description="Runs all checks of loading: names, sizes, hashes, formats, graphs. If one "
        "fails: exit code 3 and one line with the cause.",
    )
    options.add_bundle(parser)
    parser.add_argument(
        "--key", type=Path, metavar="PUBLIC", help="public key (PEM) that it must be signed with"
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    key = TrustedKey(arguments.key) if arguments.key else None
    shown = sys.stderr.isatty() and not arguments.quiet

    def tell(fraction: float) -> None:
        text = "" if fraction >= 1 else f"checking {fraction:.0%}"
        print(f"\r{text:<30}\r", end="", file=sys.stderr, flush=True)

    try:
        found = verify_bundle(arguments.bundle, key, tell if shown else lambda fraction: None)
    finally:
        if shown:
            tell(1.0)
    if arguments.json:
        document = {"ok": True, **asdict(found), "bytes_per_second": found.rate}
        output.print_json(document)
        return 0
    print("bundle     whole and well-formed")
    print(f"signature  {SIGNATURES[found.signature]}")
    print(
        f"checked    {found.bytes / 1e6:.1f} MB in {found.seconds:.2f} s, "
        f"{found.rate / 1e9:.2f} GB/s"
    )
    return 0
