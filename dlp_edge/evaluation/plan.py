"""Plans which systems answer which questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlp_edge.errors import UsageError
from dlp_edge.evaluation.metrics import kind_of
from dlp_edge.evaluation.questions import (
    SYSTEMS,
    Question,
    System,
    bare_questions,
    joined_questions,
    plain_questions,
    task_groups,
)
from dlp_edge.evaluation.tasks import EvalTask
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.runtime.request import parse_schedule

PARTS = ("tasks", "likelihood", "joined", "mixed", "bare", "sweep")
DEFAULT_PARTS = ("tasks", "likelihood", "joined")
# Routing variants of the sweep; each changes one option of the bundle.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "nucleus p=0.4": {"select": "nucleus", "p": 0.4},
    "nucleus p=0.6": {"select": "nucleus", "p": 0.6},
    "nucleus p=0.8": {"select": "nucleus", "p": 0.8},
    "threshold p=0.3": {"select": "threshold", "p": 0.3},
    "top-k k=1": {"select": "top_k", "k": 1},
    "top-k k=2": {"select": "top_k", "k": 2},
    "top-k k=3": {"select": "top_k", "k": 3},
    "weigh softmax": {"weigh": "softmax"},
    "weigh renormalise": {"weigh": "renormalise"},
    "kv recompute": {"kv": "recompute"},
    "route once a prompt": {"route_every": "prompt"},
    "inertia 0.3": {"inertia": 0.3},
    "inertia 0.5": {"inertia": 0.5},
    "inertia 0.7": {"inertia": 0.7},
    "abstain never": {"min_confidence": 0.0},
    "abstain below 0.5": {"min_confidence": 0.5},
}


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation measures.

    Attributes:
        systems: of SYSTEMS.
        parts: of PARTS.
        multi: the adapter trained on all tasks; routing never picks it.
        routing: options of `dlp` that override the bundle's.
        joined: numbers of questions joined in one prompt.
        mixed: sizes of the task groups that routing is restricted to.
        max_new_tokens: upper limit per question (see `rooms_of`).
        batch: questions generated as one batch. Faster, but only 1 times each answer.
    """

    systems: tuple[str, ...] = SYSTEMS
    parts: tuple[str, ...] = DEFAULT_PARTS
    multi: str | None = None
    routing: Mapping[str, Any] = field(default_factory=dict)
    joined: tuple[int, ...] = (2,)
    mixed: tuple[int, ...] = (2, 3)
    max_new_tokens: int = 192
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for what, names, known in (
            ("system", self.systems, SYSTEMS),
            ("part", self.parts, PARTS),
        ):
            for name in names:
                if name not in known:
                    raise UsageError(f"there is no {what} {name!r}", f"Use {', '.join(known)}")
        parse_schedule(self.routing)
        if min((*self.joined, *self.mixed), default=2) < 2:
            raise UsageError("joined and mixed sizes must be at least 2", "Choose 2 or more")
        for what, number in (("max_new_tokens", self.max_new_tokens), ("batch", self.batch)):
            if number < 1:
                raise UsageError(f"{what} is {number}", "Choose at least 1")


@dataclass(frozen=True)
class Plan:
    """Questions by part, and the systems that answer each.

    Attributes:
        questions: "tasks", "bare", "joined 2", ... -> its questions.
        systems: question -> its systems by name.
        weighed: questions whose choices are scored by likelihood -> systems by name.
    """

    questions: dict[str, list[Question]] = field(default_factory=dict)
    systems: dict[Question, dict[str, System]] = field(default_factory=dict)
    weighed: dict[Question, dict[str, System]] = field(default_factory=dict)


def make_plan(
    tasks: Sequence[EvalTask],
    adapters: Sequence[str],
    rooms: Mapping[str, int],
    settings: EvalSettings,
) -> Plan:
    """Build the plan. All parts but the plain tasks use only tasks that have an adapter.

    Args:
        rooms: task -> maximum tokens of an answer.

    Raises:
        UsageError: no task has an adapter of the bundle, or the bundle has no adapter `multi`.
    """
    owned = [task for task in tasks if task.name in adapters]
    if not owned:
        names = ", ".join(task.name for task in tasks)
        raise UsageError(
            f"no task has an adapter: the tasks are {names}, the bundle has "
            f"{', '.join(adapters) or 'no adapters'}",
            "Give a task's folder the name of its adapter",
        )
    if settings.multi is not None and settings.multi not in adapters:
        raise UsageError(f"the bundle has no adapter {settings.multi!r}", "Check --multi")
    plan, parts = Plan(), settings.parts
    plain = plain_questions(tasks, rooms)
    _add(plan, "tasks", plain, adapters, settings)
    if "likelihood" in parts:
        for question in plain:
            if kind_of(question.parts[0].sample) == "choice":
                plan.weighed[question] = _systems(question, adapters, settings)
    if "bare" in parts and (bare := bare_questions(owned, rooms)):  # none: no fixed wording
        _add(plan, "bare", bare, adapters, settings)
    if "joined" in parts:
        for count in settings.joined:
            joined = joined_questions(owned, count, rooms, settings.seed)
            _add(plan, f"joined {count}", joined, adapters, settings)
            if "dlp" in settings.systems and settings.batch == 1:  # a batch answers prompts whole
                options: GenerateOptions = {**_routed(settings), "requests": "auto"}
                for question in joined:
                    plan.systems[question][APART] = System(APART, options)
    if "mixed" in parts and "dlp" in settings.systems:
        for count in settings.mixed:
            if count < len(owned):
                _add_mixed(
                    plan, plain, task_groups(owned, count, settings.seed), adapters, settings
                )
    return plan


def system_options(
    name: str, question: Question, adapters: Sequence[str], settings: EvalSettings
) -> GenerateOptions | None:
    """A system's generation options for a question; None if it cannot answer it."""
    if name == "base":
        return {"adapters": {}}
    if name == "single":
        own = question.parts[0].task
        return {"adapters": own} if len(question.parts) == 1 and own in adapters else None
    if name == "multi":
        return None if settings.multi is None else {"adapters": settings.multi}
    return _routed(settings)


def _routed(settings: EvalSettings, forbid: Sequence[str] = ()) -> GenerateOptions:
    """The options for routing, which never picks the multi-task adapter."""
    asked = settings.routing.get("forbid", ())
    never = {*forbid, *asked, *([settings.multi] if settings.multi else [])}
    options: dict[str, Any] = {**settings.routing, "forbid": sorted(never)}
    return options  # type: ignore[return-value]


def _systems(
    question: Question, adapters: Sequence[str], settings: EvalSettings
) -> dict[str, System]:
    """The systems that can answer a question."""
    options = {n: system_options(n, question, adapters, settings) for n in settings.systems}
    return {name: System(name, given) for name, given in options.items() if given is not None}


def _add(
    plan: Plan,
    part: str,
    questions: list[Question],
    adapters: Sequence[str],
    settings: EvalSettings,
) -> None:
    plan.questions[part] = questions
    for question in questions:
        systems = plan.systems.setdefault(question, {})
        systems.update(_systems(question, adapters, settings))
        if "sweep" in settings.parts and part != "bare":
            for name, changes in VARIANTS.items():
                options = {**_routed(settings), **changes}
                systems[name] = System(name, options)  # type: ignore[arg-type]


def _add_mixed(
    plan: Plan,
    questions: Sequence[Question],
    groups: Sequence[tuple[str, ...]],
    adapters: Sequence[str],
    settings: EvalSettings,
) -> None:
    """Add each group's questions, with routing restricted to the group's adapters."""
    name = mixed_name(len(groups[0]))
    for group in groups:
        options = _routed(settings, [adapter for adapter in adapters if adapter not in group])
        for question in questions:
            if question.parts[0].task in group:
                plan.systems[question].setdefault(name, System(name, options))


APART = "dlp apart"  # routed, each request of the prompt on its own


def mixed_name(count: int) -> str:
    """The name of the system that routes among `count` adapters only."""
    return f"dlp of {count}"
