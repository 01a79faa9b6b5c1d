"""Finds where routing scores less than the task's own adapter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dlp_edge.evaluation.answers import Answered
from dlp_edge.evaluation.report.summary import Marked

CAUSES = {
    "abstained": "the router's confidence was too low, so the base model wrote the first sentence",
    "router": "the router ranked another task's adapter first at the first sentence",
    "router, later": "the router ranked another task's adapter first at a later sentence",
    "fusion": "the right adapter ranked first throughout, but was fused with others",
    "same adapter": "the right adapter alone wrote the whole answer; the difference is rounding",
}
_EXCERPT = 400  # characters


def losses(marked: Sequence[Marked], examples: int) -> dict[str, Any]:
    """Count the questions where `dlp` scores less than `single`, by task and cause.

    Args:
        examples: how many to include: the largest losses first, from different tasks if possible.
    """
    both = [item for item in marked if "dlp" in item.marks and "single" in item.marks]
    gains = [_gain(item) for item in both]
    lost = [item for item, gain in zip(both, gains, strict=True) if gain < 0]
    counts: dict[str, Counter[str]] = {}
    for item in lost:
        counts.setdefault(item.question.parts[0].task, Counter())[cause_of(item)] += 1
    return {
        "questions": len(both),
        "lost": len(lost),
        "won": sum(gain > 0 for gain in gains),
        "causes": CAUSES,
        "by_task": {task: dict(count) for task, count in sorted(counts.items())},
        "examples": [_example(item) for item in _worst(lost, examples)],
    }


def cause_of(item: Marked) -> str:
    """The first of CAUSES that applies."""
    task, answer = item.question.parts[0].task, item.answers["dlp"]
    first, *later = answer.decisions
    if not first.weights:
        return "abstained"
    if first.top != task:
        return "router"
    if any(decision.top != task or not decision.weights for decision in later):
        return "router, later"
    alone = all(set(decision.weights) == {task} for decision in answer.decisions)
    return "same adapter" if alone else "fusion"


def _gain(item: Marked) -> float:
    return item.marks["dlp"].score - item.marks["single"].score


def _worst(lost: Sequence[Marked], count: int) -> list[Marked]:
    """The largest losses, taking tasks in turn."""
    taken: Counter[str] = Counter()
    turns = []
    for item in sorted(lost, key=_gain):
        task = item.question.parts[0].task
        turns.append((taken[task], item))
        taken[task] += 1
    return [item for _, item in sorted(turns, key=lambda pair: pair[0])][:count]


def _example(item: Marked) -> dict[str, Any]:
    part = item.question.parts[0]
    return {
        "task": part.task,
        "cause": cause_of(item),
        "prompt": _excerpt(part.sample.prompt),
        "response": _excerpt(part.sample.response),
        "single": _excerpt(item.answers["single"].text),
        "dlp": _excerpt(item.answers["dlp"].text),
        "scores": {name: item.marks[name].score for name in ("single", "dlp")},
        "fusions": _fusions(item.answers["dlp"]),
    }


def _fusions(answer: Answered) -> list[dict[str, float]]:
    return [{name: round(w, 3) for name, w in fusion.items()} for _, fusion in answer.sentences]


def _excerpt(text: str) -> str:
    half = _EXCERPT // 2
    return text if len(text) <= _EXCERPT else f"{text[:half]} […] {text[-half:]}"
