"""Writes the report of an evaluation: results.json, report.md, report.html and the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlp_edge.errors import ResourceError
from dlp_edge.evaluation.report.pages import Block, Figure, Heading, Text, as_html, as_markdown
from dlp_edge.evaluation.report.plots import plot_scores, plot_time
from dlp_edge.evaluation.report.tables import (
    average_table,
    loss_blocks,
    part_blocks,
    task_tables,
)

TITLE = "Evaluation"
DEFINITIONS = (
    "base: the backbone alone. single: the task's own adapter, pinned. multi: one adapter "
    "trained on all tasks. dlp: routed and fused sentence by sentence.",
    "Answers are greedy. Score: for multiple choice, whether the answer picks the right choice "
    "(it or its first line equals the choice, or begins with it, after normalisation); whether the "
    "number after #### is right if the response has one; else ROUGE-L F1. Averages weight all "
    "tasks that have an adapter equally.",
    "Brackets: 95 % confidence intervals. Wilson's for proportions, else a bootstrap over samples "
    "(2,000 resamples within each task, paired for differences).",
    "time / base: time relative to the base model for the same prompt and number of new tokens "
    "(those of the shorter answer), including routing and fusion, summed over the questions. "
    "median: of the ratios per question. The systems answer each question in succession. "
    "wall / base: the same for the complete answers, whatever their length.",
)


def write_report(document: dict[str, Any], folder: Path) -> None:
    """Write all files of the report.

    Raises:
        ResourceError: the folder cannot be written.
    """
    blocks = report_blocks(document)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (folder / "results.json").write_text(text, encoding="utf-8")
        (folder / "report.md").write_text(as_markdown(blocks), encoding="utf-8")
        (folder / "report.html").write_text(as_html(TITLE, blocks), encoding="utf-8")
        for block in blocks:
            if isinstance(block, Figure):
                (folder / block.name).write_bytes(block.png)
    except OSError as error:
        raise ResourceError(
            f"the report cannot be written to {folder} ({error.strerror})", "Choose another folder"
        ) from error


def report_blocks(document: dict[str, Any]) -> list[Block]:
    """The blocks of the report."""
    bundle = document["bundle"]
    questions = sum(task["questions"] for task in document["tasks"])
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Text(
            f"{bundle['backbone']} ({bundle['quantisation']}, {bundle['device']}), "
            f"{len(bundle['adapters'])} adapters, {bundle['router'] or 'no'} router; "
            f"{len(document['tasks'])} tasks, {questions} questions."
        ),
        Heading("Averages over tasks"),
        average_table(document["averages"], document["systems"]),
        Figure("scores.png", plot_scores(document), "Score of each task by system"),
        Figure("time.png", plot_time(document), "Average score against time relative to base"),
        *task_tables(document),
        *part_blocks(document),
        *loss_blocks(document["losses"]),
        Heading("Definitions"),
        *(Text(text) for text in DEFINITIONS),
    ]
    return blocks
