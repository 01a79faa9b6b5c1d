"""`dlp-edge export`: backbone + adapters + router -> bundle."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlp_edge.cli import options, output
from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.progress import Progress, to_tqdm

LINE_SECONDS = 5.0
MIN_FRACTION = 0.03  # a smaller part done does not foretell the rest


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export", help="make a bundle from a backbone, PEFT adapters and a router"
    )
    parser.add_argument("--backbone", required=True, metavar="DIR|HUB_ID|FILE.gguf")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR|HUB_ID", help="repeatable"
    )
    parser.add_argument(
        "--router",
        type=Path,
        help="folder from train-router; without it adapters can only be pinned",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--to",
        default="bundle",
        choices=("bundle", "vllm"),
        help="what to write: a bundle, or a folder that vLLM serves (no --quant, no --target)",
    )
    parser.add_argument(
        "--quant",
        default="auto",
        choices=("auto", "int8", "int4", "nf4", "fp16", "fp32"),
        help="weight format; auto is the fastest that stays within 1.02 of the "
        "backbone's perplexity",
    )
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="cpu|cuda|webgpu",
        help="target device; several, joined by commas, share one bundle (webgpu is experimental)",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file instead of the backbone's"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text for the int4 search, as users write"
    )
    parser.add_argument(
        "--fast", action="store_true", help="skip what only the report needs, and measure less text"
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="FOLDER",
        help="write the report as a model card with a picture",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the sizes, memory and time that the export would take, and stop",
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    adapters = parse_named_folders(arguments.adapter)
    given = arguments.chat_template
    template = None if given is None else options.read_text(given)
    text = arguments.calibration
    calibration = None if text is None else options.read_text(text)
    if arguments.to == "vllm":
        return _export_for_vllm(arguments, adapters, template)
    with require_extra("export"):
        from dlp_edge.export.card import write_card
        from dlp_edge.export.pipeline import export_bundle
        from dlp_edge.export.plan import plan_export
        from dlp_edge.export.source import adapter_folder
    quantisation = None if arguments.quant == "auto" else arguments.quant
    if arguments.dry_run:
        plan = plan_export(arguments.backbone, quantisation, arguments.target).as_dict()
        if arguments.json:
            output.print_json(plan)
        else:
            print_plan(plan)
        return 0
    with progress_bar(arguments.quiet) as tell, _hint_at_resuming(arguments.quiet):
        report = export_bundle(
            arguments.backbone,
            {name: adapter_folder(folder.as_posix()) for name, folder in adapters.items()},
            arguments.router,
            arguments.output,
            quantisation=quantisation,
            target=arguments.target,
            chat_template=template,
            on_progress=tell,
            fast=arguments.fast,
            calibration=calibration,
        )
    if arguments.card:
        write_card(report, arguments.card)
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
    if "greedy" in report:
        greedy = report["greedy"]
        print(
            f"greedy      {greedy['agreement']:.1%} of the bundle's tokens are those that the "
            f"source would choose after the same text; {greedy['same_start']:.0f} of "
            f"{greedy['tokens']} before the first other one ({greedy['prompts']} prompts)"
        )
    if "half" in report:
        print(f"half        {report['half']['ratio']:.4f} times the perplexity, for CUDA")
    if "milliseconds_per_token" in report:
        print(f"speed       {report['milliseconds_per_token']:.1f} ms per token")
    print(f"time        {report['seconds']:.0f} s")
    print(f"verdict     {report['verdict']}")
    return 0


def _export_for_vllm(
    arguments: argparse.Namespace, adapters: Mapping[str, Path], template: str | None
) -> int:
    """Writes a folder for vLLM.

    Raises:
        UsageError: an option is one of bundles.
    """
    of_bundles = {
        "--quant": arguments.quant != "auto",
        "--target": arguments.target != "cpu",
        "--calibration": arguments.calibration is not None,
        "--fast": arguments.fast,
        "--card": arguments.card is not None,
        "--dry-run": arguments.dry_run,
    }
    given = [name for name, is_given in of_bundles.items() if is_given]
    if given:
        raise UsageError(f"{given[0]} is an option of bundles", "Leave it out with --to vllm")
    with require_extra("export"):
        from dlp_edge.export.source import adapter_folder
        from dlp_edge.export.vllm.pipeline import export_for_vllm
    with progress_bar(arguments.quiet) as tell:
        written = export_for_vllm(
            arguments.backbone,
            {name: adapter_folder(folder.as_posix()) for name, folder in adapters.items()},
            arguments.router,
            arguments.output,
            chat_template=template,
            on_progress=tell,
        )
    print_vllm_folder(written, arguments)
    return 0


def print_vllm_folder(written: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Prints what was written to `--output` for vLLM."""
    if arguments.json:
        output.print_json({"folder": str(arguments.output), **written})
        return
    print(f"folder      {arguments.output}")
    print(f"backbone    {written['backbone']}")
    print(f"skills      {', '.join(written['skills'])}")
    print(f"size        {sum(written['bytes'].values()) / 1e6:.0f} MB")
    print(
        f"fusions     of {written['max_skills']} skills at most, rank {written['max_rank']} "
        f"(--max-lora-rank {written['max_lora_rank']})"
    )
    print(f"next        {arguments.output / 'serve.md'}")


@contextmanager
def _hint_at_resuming(quiet: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not quiet:
            output.note("interrupted; the same command resumes")
        raise


def print_plan(plan: Mapping[str, Any]) -> None:
    types = ", ".join(f"{count} x {name}" for name, count in plan["source_types"].items())
    print(f"backbone    {plan['architecture']}, {plan['parameters'] / 1e9:.2f} billion parameters")
    print(f"matrices    {types}")
    print(f"weights     {plan['quantisation']}")
    print(f"bundle      about {plan['bundle_bytes'] / 1e6:.0f} MB")
    print(f"disk        about {plan['work_bytes'] / 1e9:.1f} GB meanwhile")
    print(f"memory      about {plan['memory_bytes'] / 1e9:.1f} GB")
    print(f"time        about {plan['cpu_minutes']:.0f} minutes of one core")


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
        yield progress_lines()
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # not in every extra
        yield _show_progress if not quiet else lambda step, fraction: None
        return
    form = "{l_bar}{bar}| {elapsed} {postfix}"
    start_time = time.monotonic()
    with tqdm(total=100, bar_format=form, disable=quiet or None, leave=False) as bar:
        show = to_tqdm(bar)
        yield lambda step, fraction: show(step + time_left(start_time, fraction), fraction)


def _show_progress(step: str, fraction: float) -> None:
    output.show_status("" if fraction >= 1 else f"{fraction:4.0%}  {step}")


def progress_lines() -> Progress:
    """Prints a step to stderr when it begins (of those that alternate, one for each hundredth),
    and every LINE_SECONDS while it goes on."""
    start_time = printed = time.monotonic()
    told, reached = "", -1.0

    def tell(step: str, fraction: float) -> None:
        nonlocal printed, told, reached
        is_new = step != told and fraction >= reached + 0.01
        if is_new or time.monotonic() - printed >= LINE_SECONDS:
            printed, told, reached = time.monotonic(), step, fraction
            left = time_left(start_time, fraction)
            print(f"{fraction:4.0%}  {step}{left}", file=sys.stderr, flush=True)

    return tell


def time_left(start_time: float, fraction: float) -> str:
    """How long the rest will take if it goes on at the same rate; "" while that says nothing."""
    passed = time.monotonic() - start_time
    if passed < LINE_SECONDS or not MIN_FRACTION <= fraction < 1:
        return ""
    left = passed * (1 - fraction) / fraction
    return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
