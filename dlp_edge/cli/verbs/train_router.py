"""`dlp-edge train-router TASKS_DIR -o ROUTER`: task files -> router folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import progress_bar, require_extra
from dlp_edge.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train-router", help="train a router on task files")
    parser.add_argument(
        "tasks", type=Path, metavar="TASKS_DIR", help="holds NAME/train.jsonl and NAME/dev.jsonl"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ROUTER")
    parser.add_argument(
        "--arch", choices=("mlp", "albert"), default="mlp", help="router architecture"
    )
    parser.add_argument(
        "--tokenizer",
        default="train",
        metavar="PATH_OR_ID",
        help="a tokenizer.json, ALBERT's spiece.model, a folder or a hub id; `train` (default) "
        "makes one from the tasks",
    )
    parser.add_argument(
        "--pretrained", metavar="DIR_OR_ID", help="an ALBERT to begin from (--arch albert)"
    )
    parser.add_argument(
        "--backbone",
        metavar="DIR|FILE|ID",
        help="begin with the input embeddings of this backbone (--arch mlp): meant for short and "
        "few examples",
    )
    parser.add_argument(
        "--out-of-scope",
        type=Path,
        metavar="FILE",
        help="a .jsonl file of prompts that no skill is for; a fourth of them is measured on",
    )
    parser.add_argument("--max-examples", type=int, metavar="N", help="train on N examples at most")
    parser.add_argument("--seed", type=int, default=0)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.pretrained is not None and arguments.arch != "albert":
        raise UsageError("--pretrained is for --arch albert only", "Leave it out")
    if arguments.backbone is not None and arguments.arch != "mlp":
        raise UsageError("--backbone is for --arch mlp only", "Leave it out")
    if arguments.max_examples is not None and arguments.max_examples < 1:
        raise UsageError(f"--max-examples is {arguments.max_examples}", "Choose at least 1")
    with require_extra("export"):
        from dlp_edge.models.training import train_router
    with (
        progress_bar(arguments.quiet) as tell,
        _backbone_folder(arguments.backbone) as backbone,
    ):
        report = train_router(
            arguments.tasks,
            arguments.output,
            arguments.tokenizer,
            arguments.seed,
            tell,
            arch=arguments.arch,
            pretrained=arguments.pretrained,
            max_examples=arguments.max_examples,
            backbone=backbone,
            out_of_scope=arguments.out_of_scope,
        )
    if arguments.json:
        output.print_json(asdict(report))
        return 0
    print(f"router      {arguments.output}")
    print(f"labels      {', '.join(report.settings.labels)}")
    print(f"parameters  {report.parameters:,}")
    print(f"{'':20}{'accuracy':>9} {'calibration error':>18} {'kept':>7} {'examples':>9}")
    for kind, found in report.measured.items():
        error = "-" if found.calibration_error is None else f"{found.calibration_error:.3f}"
        shares = f"{_percent(found.accuracy):>9} {error:>18} {_percent(found.kept):>7}"
        print(f"  {kind:<18}{shares} {found.examples:>9,}")
    print(f"other texts {report.others_to_base:.1%} to the base model")
    print(f"confidence  {report.min_confidence:.3f} at least, or the base model answers")
    for choice in report.thresholds:
        if choice.min_confidence is not None:
            shares = ", ".join(f"{kind} {share:.1%}" for kind, share in choice.to_base.items())
            print(f"  {choice.min_confidence:.3f} keeps {choice.kept:.0%}; to the base: {shares}")
    print(f"time        {report.seconds:.0f} s on {report.examples:,} examples")
    return 0


@contextmanager
def _backbone_folder(backbone: str | None) -> Iterator[Path | None]:
    if backbone is None:
        yield None
        return
    from dlp_edge.export.source import load_source

    with load_source(backbone) as source:
        yield source.folder


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
