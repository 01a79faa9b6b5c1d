"""`dlp-edge train-router TASKS_DIR -o ROUTER`: task files -> router folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from dlp_edge.cli import options, output
from dlp_edge.cli.export import progress_bar, require_extra


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("train-router", help="train a router on task files")
    parser.add_argument(
        "tasks", type=Path, metavar="TASKS_DIR", help="holds NAME/train.jsonl and NAME/dev.jsonl"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ROUTER")
    parser.add_argument("--arch", choices=("mlp",), default="mlp", help="router architecture")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="a tokenizer.json, a folder or a hub id; by default one is trained on the tasks",
    )
    parser.add_argument("--seed", type=int, default=0)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra("export"):
        from dlp_edge.models.training import train_router
    with progress_bar(arguments.quiet) as tell:
        report = train_router(
            arguments.tasks, arguments.output, arguments.tokenizer, arguments.seed, tell
        )
    if arguments.json:
        output.print_json(asdict(report))
        return 0
    accuracy = report.accuracy
    print(f"router      {arguments.output}")
    print(f"labels      {', '.join(report.settings.labels)}")
    print(f"parameters  {report.parameters:,}")
    print(f"accuracy    {_percent(accuracy.prompts)} on prompts")
    print(f"            {_percent(accuracy.bare_prompts)} on prompts without their common wording")
    print(f"            {_percent(accuracy.sentences)} on sentences of answers to mixed prompts")
    print(f"time        {report.seconds:.0f} s on {report.examples:,} examples")
    return 0


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"
