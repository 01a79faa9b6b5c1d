"""The tables of a report, made of the results document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlp_edge.evaluation.pages import Block, Heading, Quote, Table, Text

NOTHING = "–"
GROUPS = {"choice": "multiple choice", "text": "free text", "all": "all"}
SHARES = {
    "right": "right choice",
    "named": "only it named",
    "likelihood": "by likelihood",
    "number": "right number",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge_l": "ROUGE-L",
    "exact": "exact",
}
OF_KIND = {
    "choice": ("right", "named", "likelihood", "exact"),
    "number": ("number", "bleu", "rouge1", "rouge_l"),
    "text": ("bleu", "rouge1", "rouge_l", "exact"),
}


def percent(found: dict[str, float] | None, brackets: bool = True) -> str:
    """A share as a percentage with its interval."""
    if found is None:
        return NOTHING
    value = f"{100 * found['value']:.1f}"
    return f"{value} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]" if brackets else value


def points(found: dict[str, float] | None) -> str:
    """A difference in percentage points."""
    if found is None:
        return NOTHING
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def ratio(found: dict[str, float] | None) -> str:
    """A ratio with its interval."""
    if found is None:
        return NOTHING
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def average_table(averages: dict[str, Any], systems: Sequence[str]) -> Table:
    """Score and time ratio of each system, by kind of task."""
    rows = []
    for group, found in averages.items():
        for system in systems:
            own = found["systems"][system]
            rows.append(
                [
                    f"{GROUPS[group]} ({found['tasks']} tasks), {system}",
                    percent(own["score"]),
                    ratio(own["time_ratio"]),
                ]
            )
        rows.append([f"{GROUPS[group]}, dlp - single", points(found["dlp - single"]), NOTHING])
    return Table(["", "score %", "time / base"], rows)


def task_tables(document: dict[str, Any]) -> list[Block]:
    """For each kind of task, the metrics of every task and system."""
    blocks: list[Block] = []
    titles = {
        "choice": "Multiple choice",
        "number": "Free text with a final number",
        "text": "Free text",
    }
    for kind, title in titles.items():
        tasks = [task for task in document["tasks"] if task["kind"] == kind]
        if tasks:
            blocks += [Heading(title), _metric_table(tasks, document["systems"], OF_KIND[kind])]
    return blocks


def _metric_table(
    tasks: Sequence[dict[str, Any]], systems: Sequence[str], shares: Sequence[str]
) -> Table:
    header = ["task, system", "n", "score %", *(f"{SHARES[share]} %" for share in shares)]
    rows = []
    for task in tasks:
        for system in systems:
            own = task["systems"][system]
            if own is None:
                rows.append(
                    [f"{task['name']}, {system}: no adapter", *[NOTHING] * (len(header) + 1)]
                )
                continue
            means = [percent(own["means"].get(share), brackets=False) for share in shares]
            rows.append(
                [
                    f"{task['name']}, {system}",
                    str(own["questions"]),
                    percent(own["score"]),
                    *means,
                    ratio(own["time_ratio"]),
                    NOTHING if own["wall_ratio"] is None else f"{own['wall_ratio']:.2f}",
                ]
            )
        if task["routed"] is not None:
            share = f"routed to it {task['routed']:.0%}"
            rows.append(
                [f"{task['name']}, dlp - single ({share})", "", points(task["dlp - single"])]
            )
            rows[-1] += [""] * (len(header) - 1)
    return Table([*header, "time / base", "wall / base"], rows)


def part_blocks(document: dict[str, Any]) -> list[Block]:
    """Tables of the parts beside the plain tasks, as far as they were measured."""
    blocks: list[Block] = []
    if "bare" in document:
        blocks += [
            Heading("Without the task's instruction line and choices"),
            average_table(document["bare"]["averages"], document["systems"]),
        ]
    if "mixed" in document:
        rows = [
            [f"{found['count']} tasks, {system}", percent(own["score"]), ratio(own["time_ratio"])]
            for found in document["mixed"]
            for system, own in found["systems"].items()
        ]
        blocks += [
            Heading("Composite-n: tasks mixed in one stream"),
            Text(
                "The tables above are one stream of all tasks in random order. Here routing "
                "may only pick the adapters of a random group of n tasks (dlp of n)."
            ),
            Table(["", "score %", "time / base"], rows),
        ]
    if "sweep" in document:
        blocks += [Heading("Routing rules"), *_sweep_tables(document["sweep"])]
    return blocks


def _sweep_tables(sweep: dict[str, Any]) -> list[Block]:
    rows = [
        [
            name,
            percent(found["score"]),
            points(found["difference"]),
            ratio(found["time_ratio"]),
            f"{found['adapters']:.2f}",
            f"{found['switches']:.2f}",
        ]
        for name, found in sweep["tasks"].items()
    ]
    header = ["", "score %", "- single", "time / base", "adapters a sentence", "switches"]
    return [Table(header, rows)]


def loss_blocks(found: dict[str, Any] | None) -> list[Block]:
    """Where routing loses against the own adapter."""
    if found is None:
        return []
    causes = list(found["causes"])
    rows = [
        [task, *(str(counts.get(cause, 0)) for cause in causes)]
        for task, counts in found["by_task"].items()
    ]
    blocks: list[Block] = [
        Heading("Where dlp loses against single"),
        Text(
            f"Of {found['questions']} questions dlp scores less than single in {found['lost']} "
            f"and more in {found['won']}."
        ),
        Table(["task", *causes], rows),
        *(Text(f"{cause}: {meaning}.") for cause, meaning in found["causes"].items()),
    ]
    for example in found["examples"]:
        scores = example["scores"]
        fusions = "; ".join(
            " + ".join(f"{name} {weight:.2f}" for name, weight in fusion.items()) or "base"
            for fusion in example["fusions"]
        )
        blocks += [
            Heading(f"{example['task']}: {example['cause']}", 3),
            Quote(
                [
                    ("prompt", example["prompt"]),
                    ("response", example["response"]),
                    (f"single ({scores['single']:.2f})", example["single"]),
                    (f"dlp ({scores['dlp']:.2f})", example["dlp"]),
                    ("fusions", fusions),
                ]
            ),
        ]
    return blocks
