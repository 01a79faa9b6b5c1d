"""`dlp-edge pull HUB_ID|URL`: fetches a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import progress_bar


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="fetch a bundle from the hub or a web server",
        description="Fetches a bundle and checks it against its manifest. An interrupted download "
        "resumes. The hub needs the extra `hub`; HF_TOKEN and HF_ENDPOINT are respected.",
    )
    parser.add_argument("source", metavar="HUB_ID|URL", help="user/bundle, or a folder's URL")
    parser.add_argument("-o", "--output", type=Path, metavar="BUNDLE", help="default: its name")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.hub.fetch import fetch_bundle

    out = arguments.output or Path(arguments.source.rstrip("/").rpartition("/")[2])
    with progress_bar(arguments.quiet) as tell:
        manifest = fetch_bundle(arguments.source, out, arguments.revision, tell)
    size = sum(entry.size for entry in manifest.files.values())
    names = [adapter.name for adapter in manifest.adapters]
    if arguments.json:
        output.print_json({"bundle": str(out), "bytes": size, "adapters": names})
        return 0
    print(f"bundle    {out} ({size / 1e6:.0f} MB)")
    print(f"adapters  {', '.join(names) or 'none'}")
    return 0
