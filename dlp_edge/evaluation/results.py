"""Collects all results of an evaluation in one JSON document, the source of reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dlp_edge.evaluation.intervals import Interval, median_ratio, ratio_of_sums
from dlp_edge.evaluation.joined import joined_document, mark_joined
from dlp_edge.evaluation.losses import losses
from dlp_edge.evaluation.plan import APART, VARIANTS, EvalSettings, Plan, mixed_name
from dlp_edge.evaluation.report.summary import (
    Figures,
    Marked,
    average,
    by_task,
    difference,
    figures_of,
    mark_all,
    paired_times,
)
from dlp_edge.evaluation.runner import Answers
from dlp_edge.evaluation.tasks import EvalTask

Document = dict[str, Any]


def collect(
    tasks: Sequence[EvalTask], plan: Plan, answers: Answers, settings: EvalSettings, examples: int
) -> Document:
    """The figures of all parts; `examples`: of losses."""
    marked = mark_all(plan.questions["tasks"], answers)
    systems = [name for name in settings.systems if any(name in m.marks for m in marked)]
    owned = [item for item in marked if "single" in item.marks] or marked
    document: Document = {
        "systems": systems,
        "tasks": [_task(task, by_task(marked)[task.name], systems) for task in tasks],
        "averages": averages(tasks, owned, systems),
        "losses": losses(marked, examples) if {"dlp", "single"} <= set(systems) else None,
    }
    if "bare" in plan.questions:
        bare = mark_all(plan.questions["bare"], answers)
        document["bare"] = averages(tasks, bare, systems)
    swept = ["dlp", *VARIANTS] if "sweep" in settings.parts else []
    if swept:
        document["sweep"] = {name: _variant(owned, name) for name in swept}
    if "joined" in settings.parts:
        document["joined"] = {
            str(count): joined_document(
                mark_joined(plan.questions[f"joined {count}"], answers),
                marked,
                [*systems, APART, *(VARIANTS if swept else ())],
            )
            for count in settings.joined
        }
    if "mixed" in settings.parts:
        names = [(count, mixed_name(count)) for count in settings.mixed]
        found = {name for _, name in answers.found}
        document["mixed"] = [_mixed(marked, *name) for name in names if name[1] in found]
    return document


def averages(
    tasks: Sequence[EvalTask], marked: Sequence[Marked], systems: Sequence[str]
) -> Document:
    """Means over tasks, for the multiple-choice tasks, the others and all of them."""
    kinds = {task.name: task.kind for task in tasks}
    groups = {
        "choice": [m for m in marked if kinds[m.question.parts[0].task] == "choice"],
        "text": [m for m in marked if kinds[m.question.parts[0].task] != "choice"],
        "all": list(marked),
    }
    return {
        group: {
            "tasks": len(by_task(items)),
            "questions": len(items),
            "systems": {name: _average(items, name) for name in systems},
            "routed": routed_share(items),
            "dlp - single": _interval(difference(items, "dlp", "single")),
            "single - base": _interval(difference(items, "single", "base")),
        }
        for group, items in groups.items()
        if items
    }


def _average(items: Sequence[Marked], system: str) -> Document:
    times = paired_times([item.answers for item in items], system, "base")
    shares = ("score", "exact", "named", "likelihood", "rouge1", "rouge_l")
    return {
        **{share: _interval(average(items, system, share)) for share in shares},
        "time_ratio": _interval(ratio_of_sums(times) if times else None),
        "median_ratio": _interval(median_ratio(times) if times else None),
    }


def _task(task: EvalTask, items: Sequence[Marked], systems: Sequence[str]) -> Document:
    return {
        "name": task.name,
        "kind": task.kind,
        "split": task.split,
        "questions": len(task.samples),
        "systems": {name: _figures(figures_of(items, name)) for name in systems},
        "dlp - single": _interval(difference(items, "dlp", "single")),
        "routed": routed_share(items),
    }


def routed_share(items: Sequence[Marked]) -> float | None:
    """The share of routed questions whose first decision ranked the task's own adapter first."""
    firsts = [
        item.answers["dlp"].decisions[0].top == item.question.parts[0].task
        for item in items
        if "dlp" in item.answers
    ]
    return sum(firsts) / len(firsts) if firsts else None


def _variant(marked: Sequence[Marked], name: str) -> Document:
    own = [item.answers[name] for item in marked if name in item.answers]
    return {
        **_average(marked, name),
        "difference": _interval(difference(marked, name, "single")),
        "change": _interval(difference(marked, name, "dlp")),
        "adapters": sum(len(f) for a in own for _, f in a.sentences)
        / max(1, sum(len(a.sentences) for a in own)),
        "switches": sum(answer.switches for answer in own) / max(1, len(own)),
    }


def _mixed(marked: Sequence[Marked], count: int, name: str) -> Document:
    """Routing among groups of `count` tasks, beside the other systems on the same questions."""
    own = [item for item in marked if name in item.marks]
    systems = [s for s in ("base", "single", "multi", "dlp", name) if average(own, s) is not None]
    return {
        "count": count,
        "systems": {system: _average(own, system) for system in systems},
        "difference": _interval(difference(own, name, "single")),
    }


def _figures(figures: Figures | None) -> Document | None:
    return None if figures is None else asdict(figures)


def _interval(interval: Interval | None) -> Document | None:
    return None if interval is None else asdict(interval)
