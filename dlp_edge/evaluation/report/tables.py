"""The tables of a report, from the results document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlp_edge.evaluation.report.pages import Block, Heading, Quote, Table, Text

NOTHING = "–"
GROUPS = {"choice": "multiple choice", "text": "free text", "all": "all"}
SHARES = {
    "right": "right choice",
    "named": "only choice named",
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
    """Score and time ratio of each system by kind of task; only "all" if there is one kind."""
    rows = []
    for group, found in averages.items():
        if group != "all" and len(averages) == 2:
            continue
        for system in systems:
            own = found["systems"][system]
            rows.append(
                [
                    f"{GROUPS[group]} ({found['tasks']} tasks), {system}",
                    percent(own["score"]),
                    percent(own["likelihood"]),
                    ratio(own["time_ratio"]),
                    ratio(own["median_ratio"]),
                ]
            )
        rows += [
            [f"{GROUPS[group]}, {names}", points(found[names]), *[NOTHING] * 3]
            for names in ("single - base", "dlp - single")
            if found[names] is not None
        ]
    return Table(["", "score %", "by likelihood %", "time / base", "median"], rows)


def task_tables(document: dict[str, Any]) -> list[Block]:
    """The metrics of every task and system, one table per kind of task."""
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
            share = f"routed correctly {task['routed']:.0%}"
            rows.append(
                [f"{task['name']}, dlp - single ({share})", "", points(task["dlp - single"])]
            )
            rows[-1] += [""] * (len(header) - 1)
    return Table([*header, "time / base", "wall / base"], rows)


def part_blocks(document: dict[str, Any]) -> list[Block]:
    """Tables of the parts other than the plain tasks, if measured."""
    blocks: list[Block] = []
    if "mixed" in document:
        blocks += _mixed_blocks(document["mixed"])
    for count, found in document.get("joined", {}).items():
        blocks += _joined_blocks(count, found)
    if "bare" in document:
        routed = [document[part]["all"]["routed"] for part in ("averages", "bare")]
        blocks += [
            Heading("Without instruction line and choices"),
            average_table(document["bare"], document["systems"]),
        ]
        if None not in routed:
            shares = " and ".join(f"{share:.1%}" for share in routed)
            blocks.append(
                Text(f"Routed to the task's own adapter with and without them: {shares}.")
            )
    if document.get("beside"):
        blocks += [Heading("Comparison with other evaluations"), _beside_table(document)]
    if "sweep" in document:
        blocks += [Heading("Routing rules"), _sweep_table(document["sweep"])]
    return blocks


def _beside_table(document: dict[str, Any]) -> Table:
    rows = []
    for name, other in {"this one": document, **document["beside"]}.items():
        for group, found in other["averages"].items():
            if "dlp" not in found["systems"]:
                continue
            own = found["systems"]["dlp"]
            routed = NOTHING if found["routed"] is None else f"{found['routed']:.1%}"
            rows.append(
                [
                    f"{name}, {group} ({found['questions']} questions)",
                    other["bundle"]["router"] or NOTHING,
                    routed,
                    percent(own["score"]),
                    points(found["dlp - single"]),
                    ratio(own["time_ratio"]),
                ]
            )
    header = ["dlp", "router", "routed correctly", "score %", "- single", "time / base"]
    return Table(header, rows)


def _mixed_blocks(groups: Sequence[dict[str, Any]]) -> list[Block]:
    rows = [
        [f"{found['count']} tasks, {system}", percent(own["score"]), ratio(own["time_ratio"])]
        for found in groups
        for system, own in found["systems"].items()
    ]
    text = (
        "The tables above mix all tasks in one stream. Here, routing is restricted to the "
        "adapters of a random group of n tasks (dlp of n)."
    )
    return [
        Heading("Composite-n: tasks mixed in one stream"),
        Text(text),
        Table(["", "score %", "time / base"], rows),
    ]


def _joined_blocks(count: str, found: dict[str, Any]) -> list[Block]:
    rows = [
        [
            name,
            percent(own["score"]),
            ", ".join(f"{100 * share:.1f}" for share in own["positions"]),
            percent(found["alone"].get(name)),
            ratio(own["time_ratio"]),
            f"{own['switches']:.2f}",
        ]
        for name, own in found["systems"].items()
    ]
    if found["alone"].get("single"):
        rows.append(["single", NOTHING, NOTHING, percent(found["alone"]["single"])])
        rows[-1] += [NOTHING, NOTHING]
    header = ["", "score %", "by position %", "asked alone %", "time / base", "switches"]
    return [
        Heading(f"Composite-{count}: {count} questions in one prompt"),
        Text(
            f"{found['questions']} prompts. Each question gets a run of the answer's sentences, in "
            "order, with the best total score; naming a wrong choice as well scores 0. dlp apart "
            "answers each request on its own (requests=auto). "
            f"dlp - single asked alone: {points(found['dlp - single alone'])} points."
        ),
        Table(header, rows),
    ]


def _sweep_table(sweep: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            percent(found["score"]),
            points(found["difference"]),
            points(found["change"]),
            ratio(found["time_ratio"]),
            f"{found['adapters']:.2f}",
            f"{found['switches']:.2f}",
        ]
        for name, found in sweep.items()
    ]
    header = [
        "",
        "score %",
        "- single",
        "- dlp",
        "time / base",
        "adapters per sentence",
        "switches",
    ]
    return Table(header, rows)


def loss_blocks(found: dict[str, Any] | None) -> list[Block]:
    """Where routing scores less than the task's own adapter."""
    if found is None:
        return []
    causes = list(found["causes"])
    rows = [
        [task, *(str(counts.get(cause, 0)) for cause in causes)]
        for task, counts in found["by_task"].items()
    ]
    blocks: list[Block] = [
        Heading("Where dlp scores less than single"),
        Text(
            f"Of {found['questions']} questions, dlp scores less than single on {found['lost']} "
            f"and more on {found['won']}."
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
