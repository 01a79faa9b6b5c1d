"""`dlp-edge export`: backbone + adapters + router -> bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlp_edge.cli import options, output
from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.progress import Progress, to_tqdm


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export", help="make a bundle from a backbone, PEFT adapters and a router"
    )
    parser.add_argument("--backbone", required=True, metavar="DIR|HUB_ID|FILE.gguf")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="repeatable"
    )
    parser.add_argument(
        "--router",
        type=Path,
        help="folder from train-router; without it adapters can only be pinned",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--quant",
        default="auto",
        choices=("auto", "int8", "int4", "nf4", "fp16", "fp32"),
        help="weight format; auto is the fastest that stays within 1.02 of the "
        "backbone's perplexity",
    )
    parser.add_argument("--target", default="cpu", choices=("cpu", "cuda"), help="target device")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file instead of the backbone's"
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    adapters = parse_named_folders(arguments.adapter)
    given = arguments.chat_template
    template = None if given is None else options.read_text(given)
    with require_extra("export"):
        from dlp_edge.export.pipeline import export_bundle
    with progress_bar(arguments.quiet) as tell:
        report = export_bundle(
            arguments.backbone,
            adapters,
            arguments.router,
            arguments.output,
            quantisation=None if arguments.quant == "auto" else arguments.quant,
            target=arguments.target,
            chat_template=template,
            on_progress=tell,
        )
    if not arguments.quiet:
        for remark in report["remarks"]:
            output.note(f"note: {remark}")
    if arguments.json:
        output.print_json(report)
        return 0
    perplexity, parity = report["perplexity"], report["parity"]
    print(f"bundle      {arguments.output}")
    print(f"weights     {report['quantisation']} for {report['target']}")
    print(f"size        {sum(report['bytes'].values()) / 1e6:.0f} MB")
    print(f"adapters    {', '.join(adapter['name'] for adapter in report['adapters']) or 'none'}")
    print(f"perplexity  {perplexity['ratio']:.4f} x the source's ({perplexity['tokens']} tokens)")
    for kind in ("base", "fusion"):
        if kind in parity:
            found = parity[kind]
            print(
                f"parity      {kind}: logits differ by {found['max_abs_difference']:.2e} at most, "
                f"{found['greedy_agreement']:.1%} of the greedy tokens agree"
            )
    greedy = report["greedy"]
    print(
        f"greedy      {greedy['agreement']:.1%} of the bundle's tokens are those that the source "
        f"would choose after the same text; {greedy['same_start']:.0f} of {greedy['tokens']} "
        f"before the first other one ({greedy['prompts']} prompts)"
    )
    if "milliseconds_per_token" in report:
        print(f"speed       {report['milliseconds_per_token']:.1f} ms per token")
    print(f"time        {report['seconds']:.0f} s")
    print(f"verdict     {_verdict(report)}")
    return 0


def _verdict(report: dict[str, Any]) -> str:
    """Whether the bundle is as good as its source; an adapter that differs from PEFT fails."""
    from dlp_edge.export.pipeline import LARGEST_LOSS

    ratio, adapters = report["perplexity"]["ratio"], len(report["adapters"])
    proven = f"{adapters} adapters as under PEFT" if adapters else "no adapters"
    if ratio <= LARGEST_LOSS:
        return f"good: {ratio:.3f} x the source's perplexity, {proven}"
    return (
        f"look at it: {ratio:.3f} x the source's perplexity is more than {LARGEST_LOSS}, {proven}; "
        "a wider --quant costs less"
    )


def parse_named_folders(items: Sequence[str]) -> dict[str, Path]:
    """NAME=DIR arguments as a mapping.

    Raises:
        UsageError: no `=`, or one name twice.
    """
    folders: dict[str, Path] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not (separator and name and folder):
            raise UsageError(f"--adapter {item!r} is not NAME=DIR", "Write --adapter skill=folder")
        if name in folders:
            raise UsageError(f"two adapters are called {name}", "Give each its own name")
        folders[name] = Path(folder)
    return folders


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Says which extra to install when a heavy dependency is missing.

    Raises:
        ResourceError: an import inside the block failed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"{error.name} is not installed", f"Run: pip install 'dlp-edge[{extra}]'"
        ) from error


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A bar on a terminal's stderr, a line for each step elsewhere; yields what to tell of it."""
    if not quiet and not sys.stderr.isatty():
        yield _lines_of_progress()
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # not in every extra
        yield _show_progress if not quiet else lambda step, fraction: None
        return
    form = "{l_bar}{bar}| {elapsed} {postfix}"
    with tqdm(total=100, bar_format=form, disable=quiet or None, leave=False) as bar:
        yield to_tqdm(bar)


def _show_progress(step: str, fraction: float) -> None:
    output.show_status("" if fraction >= 1 else f"{fraction:4.0%}  {step}")


def _lines_of_progress() -> Progress:
    """Tells a step when it begins; of those that alternate, one for each hundredth."""
    told, reached = "", -1.0

    def tell(step: str, fraction: float) -> None:
        nonlocal told, reached
        if step != told and fraction >= reached + 0.01:
            told, reached = step, fraction
            print(f"{fraction:4.0%}  {step}", file=sys.stderr, flush=True)

    return tell
