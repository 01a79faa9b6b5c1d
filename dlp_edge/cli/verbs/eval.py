"""`dlp-edge eval BUNDLE TASKS`: the bundle's systems side by side on tasks, with a report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import progress_bar, require_extra
from dlp_edge.errors import UsageError

if TYPE_CHECKING:
    from dlp_edge.evaluation import EvalSettings, EvalTask

EXTRA = "eval"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure a bundle on tasks: base, single adapter and routed side by side",
        description="Answers the tasks' samples with the base model, each task's own adapter and "
        "routing, and writes report.html, report.md and results.json. An evaluation that was "
        "interrupted resumes when started again with the same -o.",
    )
    options.add_bundle(parser)
    parser.add_argument(
        "tasks",
        type=Path,
        metavar="TASKS_DIR",
        help="holds NAME/test.jsonl or NAME/dev.jsonl; NAME is the adapter's",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("dlp-edge-eval"), metavar="FOLDER"
    )
    parser.add_argument("--limit", type=options.whole_number(1), help="samples of each task")
    parser.add_argument("--only", metavar="A,B", help="tasks; default: all")
    parser.add_argument("--split", help="file of each task; default: test, else dev")
    parser.add_argument("--systems", metavar="A,B", help="of base, single, multi, dlp")
    parser.add_argument(
        "--multi", metavar="NAME", help="the adapter trained on all tasks; never routed to"
    )
    parser.add_argument(
        "--parts",
        metavar="A,B",
        help="of tasks, likelihood, joined, mixed, bare, sweep; or all (default: the first three)",
    )
    parser.add_argument("--joined", metavar="N,N", help="questions in one prompt (2)")
    parser.add_argument(
        "--mixed", metavar="N,N", help="number of tasks that routing may choose from (2,3)"
    )
    parser.add_argument("--max-new-tokens", type=options.whole_number(1), default=192)
    parser.add_argument(
        "--batch",
        type=options.whole_number(1),
        default=1,
        metavar="N",
        help="batch size: faster, but without time ratios (1)",
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="NAME=RESULTS_JSON",
        help="show another evaluation's figures in the report, such as another router's",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--examples", type=options.whole_number(0), default=10, help="losses shown (10)"
    )
    options.add_routing(parser)
    options.add_schedule(parser)
    options.add_engine(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with require_extra(EXTRA):
        from dlp_edge.evaluation import evaluate, read_eval_tasks, write_report
    from dlp_edge.cli.loading import open_runtime

    only = _names(arguments.only)
    tasks = read_eval_tasks(arguments.tasks, arguments.split, only, arguments.limit, arguments.seed)
    settings, beside = _settings(arguments), _read_beside(arguments.beside)
    with open_runtime(arguments) as runtime:
        if not arguments.quiet:
            _say_who_is_alone(tasks, [adapter.name for adapter in runtime.adapters])
        with progress_bar(arguments.quiet) as tell:
            document = evaluate(
                runtime, tasks, arguments.output, settings, arguments.examples, tell
            )
    document["beside"] = beside
    write_report(document, arguments.output)
    if arguments.json:
        output.print_json(document)
    else:
        _print_summary(document, arguments.output)
    return 0


def _settings(arguments: argparse.Namespace) -> EvalSettings:
    from dlp_edge.evaluation.plan import PARTS, EvalSettings

    routing = options.request_options(arguments)
    most = routing.pop("max_new_tokens")
    given: dict[str, Any] = {
        "routing": {name: value for name, value in routing.items() if name != "seed"},
        "multi": arguments.multi,
        "max_new_tokens": most,
        "seed": arguments.seed,
        "batch": arguments.batch,
    }
    if arguments.systems is not None:
        given["systems"] = _names(arguments.systems)
    if arguments.parts is not None:
        names = _names(arguments.parts)
        given["parts"] = PARTS if names == ("all",) else names
    for name in ("joined", "mixed"):
        if getattr(arguments, name) is not None:
            given[name] = options.whole_numbers(getattr(arguments, name))
    return EvalSettings(**given)


def _read_beside(items: list[str]) -> dict[str, Any]:
    """NAME=RESULTS_JSON arguments: name -> what a comparison shows of it.

    Raises:
        UsageError: one of them is no results.json.
    """
    found = {}
    for item in items:
        name, _, path = item.partition("=")
        try:
            document = json.loads(options.read_text(Path(path)))
            found[name] = {key: document[key] for key in ("bundle", "averages", "systems")}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--beside {item} is no NAME=RESULTS_JSON", "Name what an evaluation wrote"
            ) from error
    return found


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _say_who_is_alone(tasks: list[EvalTask], adapters: list[str]) -> None:
    alone = [task.name for task in tasks if task.name not in adapters]
    if alone:
        output.note(f"note: no adapter for {', '.join(alone)}: base and routed answers only")


def _print_summary(document: dict[str, Any], folder: Path) -> None:
    from dlp_edge.evaluation.report.tables import average_table

    table = average_table(document["averages"], document["systems"])
    lines = [table.header, *table.rows]
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for label, *cells in lines:
        figures = zip(cells, widths, strict=True)
        print(f"{label:<{first}}", *(f"{cell:>{width}}" for cell, width in figures), sep="  ")
    print(f"report  {folder / 'report.html'}")
