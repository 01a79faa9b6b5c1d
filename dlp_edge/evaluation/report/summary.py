"""Summarises answers: scores with intervals, differences, time ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlp_edge.evaluation.answers import Answered
from dlp_edge.evaluation.intervals import (
    Interval,
    bootstrap,
    mean_interval,
    mean_of_means,
    ratio_of_sums,
)
from dlp_edge.evaluation.metrics import Marks, bleu, bleu_counts, mark
from dlp_edge.evaluation.questions import Question
from dlp_edge.evaluation.runner import Answers

SHARES = ("right", "named", "likelihood", "number", "exact", "rouge1", "rouge_l")


@dataclass(frozen=True)
class Figures:
    """A system's results on the questions of a task.

    Attributes:
        score: the headline (`Marks.score`).
        means: mean of each metric that applies, plus BLEU of free-text answers.
        time_ratio: time relative to the base model up to the token count of the shorter answer,
            including prefill and routing; a ratio of sums.
        wall_ratio: time relative to the base model for the complete answers.
        new_tokens: mean per answer.
    """

    questions: int
    score: Interval
    means: dict[str, Interval]
    time_ratio: Interval | None
    wall_ratio: float | None
    seconds: float
    new_tokens: float


@dataclass(frozen=True)
class Marked:
    """A question with the answers and scores of all systems."""

    question: Question
    answers: dict[str, Answered]
    marks: dict[str, Marks]


def mark_all(questions: Sequence[Question], answers: Answers) -> list[Marked]:
    """Score all answers to the questions of one part."""
    systems = {name for _, name in answers.found}
    marked = []
    for question in questions:
        given = {
            name: answer
            for name in sorted(systems)
            if (answer := answers.of(question, name)) is not None
        }
        sample = question.parts[0].sample
        marks = {
            name: mark(answer.text, sample, answers.weighed.get((question, name)))
            for name, answer in given.items()
        }
        marked.append(Marked(question, given, marks))
    return marked


def figures_of(marked: Sequence[Marked], system: str) -> Figures | None:
    """Summarise a system's answers; None if it has none."""
    own = [item for item in marked if system in item.marks]
    if not own:
        return None
    marks = [item.marks[system] for item in own]
    means = {
        share: mean_interval(values)
        for share in SHARES
        if (values := [v for each in marks if (v := getattr(each, share)) is not None])
    }
    free = [item for item in own if item.marks[system].right is None]
    if free:
        means["bleu"] = _bleu(free, system)
    times = paired_times([item.answers for item in own], system, "base")
    walls = [item.answers for item in own if "base" in item.answers]
    return Figures(
        questions=len(own),
        score=mean_interval([each.score for each in marks]),
        means=means,
        time_ratio=ratio_of_sums(times) if len(times) else None,
        wall_ratio=(
            sum(each[system].seconds for each in walls)
            / sum(each["base"].seconds for each in walls)
            if walls
            else None
        ),
        seconds=float(np.mean([item.answers[system].seconds for item in own])),
        new_tokens=float(np.mean([item.answers[system].new_tokens for item in own])),
    )


def by_task(marked: Sequence[Marked]) -> dict[str, list[Marked]]:
    """Group questions by task."""
    tasks: dict[str, list[Marked]] = {}
    for item in marked:
        tasks.setdefault(item.question.parts[0].task, []).append(item)
    return tasks


def average(marked: Sequence[Marked], system: str, share: str = "score") -> Interval | None:
    """The mean over tasks of a metric's mean; None unless the system has values for every task."""
    groups = [
        [
            value
            for item in items
            if system in item.marks and (value := getattr(item.marks[system], share)) is not None
        ]
        for items in by_task(marked).values()
    ]
    return mean_of_means(groups) if groups and all(groups) else None


def difference(marked: Sequence[Marked], system: str, other: str) -> Interval | None:
    """The mean over tasks of the paired difference of scores; None if no question has both."""
    groups = [
        [item.marks[system].score - item.marks[other].score for item in items]
        for items in by_task(
            [item for item in marked if system in item.marks and other in item.marks]
        ).values()
    ]
    return mean_of_means(groups) if groups else None


def paired_times(
    answers: Sequence[Mapping[str, Answered]], system: str, other: str
) -> list[tuple[float, float]]:
    """Seconds of both systems up to the token count of the shorter answer (at least 1).

    Answers generated in batches have no token times and are skipped.
    """
    pairs = []
    for each in answers:
        if system in each and other in each:
            one, two = each[system], each[other]
            count = max(1, min(one.new_tokens, two.new_tokens))
            if len(one.clock) == one.new_tokens and len(two.clock) == two.new_tokens:
                pairs.append((one.seconds_to(count), two.seconds_to(count)))
    return pairs


def _bleu(items: Sequence[Marked], system: str) -> Interval:
    counts = np.stack(
        [
            bleu_counts(item.answers[system].text, item.question.parts[0].sample.response)
            for item in items
        ]
    )
    return bootstrap(counts, lambda rows: bleu(rows.sum(0)))
