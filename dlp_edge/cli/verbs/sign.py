"""`dlp-edge sign BUNDLE --key PRIVATE`: says of a bundle that it is from you."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlp_edge.bundle.signing import SIGNATURE, write_new_key
from dlp_edge.bundle.verify import sign_bundle
from dlp_edge.cli import options, output
from dlp_edge.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sign",
        help="sign a bundle with your key",
        description="Checks a bundle, then signs its manifest with an Ed25519 key (a PEM file, "
        "also one of openssl's). Adding or removing an adapter ends the signature. With "
        "--new-key FILE it makes a key first: FILE is to be kept secret, FILE.pub is for "
        "`dlp-edge verify --key` and `Runtime(trusted_key=...)`.",
    )
    parser.add_argument("bundle", nargs="?", type=Path, help="bundle folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", type=Path, metavar="PRIVATE", help="private key (PEM)")
    which.add_argument("--new-key", type=Path, metavar="FILE", help="make a private key")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.bundle is None and arguments.new_key is None:
        raise UsageError("there is no bundle to sign", "Name one")
    document: dict[str, str] = {}
    if arguments.new_key is not None:
        public = write_new_key(arguments.new_key)
        document |= {"private_key": str(arguments.new_key), "public_key": str(public)}
    if arguments.bundle is not None:
        sign_bundle(arguments.bundle, arguments.key or arguments.new_key)
        document["signature"] = str(arguments.bundle / SIGNATURE)
    if arguments.json:
        output.print_json(document)
        return 0
    for what, path in document.items():
        secret = "  (keep it secret)" if what == "private_key" else ""
        print(f"{what.replace('_', ' '):<12} {path}{secret}")
    return 0
