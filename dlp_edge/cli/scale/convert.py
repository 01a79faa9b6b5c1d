"""`dlp-edge convert BUNDLE --to vllm`: a bundle's skills and router for another server."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.cli import options
from dlp_edge.cli.verbs.export import print_vllm_folder, progress_bar, require_extra


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="make a folder for vLLM of a bundle",
        description="Writes what `export --to vllm` writes. The bundle has skills and router; the "
        "backbone's own weights come from where it was exported from.",
    )
    options.add_bundle(parser)
    parser.add_argument("--to", required=True, choices=("vllm",), help="what the folder is for")
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="DIR|HUB_ID|FILE.gguf",
        help="what the bundle was exported from",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    bundle = open_bundle(arguments.bundle)
    with require_extra("export"):
        from dlp_edge.export.vllm.pipeline import convert_for_vllm
    with progress_bar(arguments.quiet) as tell:
        written = convert_for_vllm(bundle, arguments.backbone, arguments.output, tell)
    print_vllm_folder(written, arguments)
    return 0
