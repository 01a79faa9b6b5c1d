"""Runs a plan: all systems answer a question in succession, in rotating order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dlp_edge.evaluation.answers import Answered, ask, ask_batch
from dlp_edge.evaluation.plan import EvalSettings, Plan
from dlp_edge.evaluation.questions import Question, System
from dlp_edge.evaluation.store import Store
from dlp_edge.runtime.runtime import Runtime

WARM_TOKENS = 2
OnProgress = Callable[[str, float], None]  # (current step, fraction done)


@dataclass(frozen=True)
class Answers:
    """Results by (question, system name).

    Attributes:
        found: answers.
        weighed: log probability of each choice.
    """

    found: dict[tuple[Question, str], Answered]
    weighed: dict[tuple[Question, str], tuple[float, ...]]

    def of(self, question: Question, system: str) -> Answered | None:
        """The answer, or None if the system did not answer the question."""
        return self.found.get((question, system))


def run_plan(
    runtime: Runtime, plan: Plan, store: Store, settings: EvalSettings, on_progress: OnProgress
) -> Answers:
    """Generate all answers that are not in the store yet.

    All tasks are shuffled into one stream with a seed. The systems answer each question (or batch)
    in succession, starting with a different system each time, so that interference on the machine
    affects all of them alike.
    """
    questions = list(plan.systems)
    random.Random(f"{settings.seed} order").shuffle(questions)
    total = sum(map(len, plan.systems.values())) + sum(map(len, plan.weighed.values()))
    answers = Answers({}, {})
    _warm_up(runtime, questions[0], plan, settings)
    for index, at in enumerate(range(0, len(questions), settings.batch)):
        batch = questions[at : at + settings.batch]
        names = list(dict.fromkeys(name for each in batch for name in plan.systems[each]))
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            asked = [each for each in batch if name in plan.systems[each]]
            systems = [plan.systems[each][name] for each in asked]
            for each, record in _answer(runtime, store, asked, systems, settings.batch):
                answers.found[each, name] = Answered.of_record(record)
            on_progress(f"{asked[0].parts[0].task}, {name}", len(answers.found) / total)
    for question, own in plan.weighed.items():
        for system in own.values():
            answers.weighed[question, system.name] = _weigh(runtime, store, question, system)
            done = len(answers.found) + len(answers.weighed)
            on_progress(f"{question.parts[0].task}, {system.name}, choices", done / total)
    return answers


def _warm_up(runtime: Runtime, question: Question, plan: Plan, settings: EvalSettings) -> None:
    """Generate a few untimed tokens: the first pass of a process is slower than the others."""
    short = replace(question, room=WARM_TOKENS)
    for system in plan.systems[question].values():
        ask(runtime, short, system)


def _answer(
    runtime: Runtime,
    store: Store,
    questions: Sequence[Question],
    systems: Sequence[System],
    size: int,
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Yield each question with its record; missing ones are generated, as a batch if `size` > 1."""
    batched = [size] if size > 1 else []
    keys = [
        store.key("answer", question.prompt, question.room, system.options, *batched)
        for question, system in zip(questions, systems, strict=True)
    ]
    missing = [i for i, key in enumerate(keys) if store.get(key) is None]
    if size > 1 and missing:
        asked = [questions[i] for i in missing]
        found = ask_batch(runtime, asked, [systems[i] for i in missing])
    else:
        found = [ask(runtime, questions[i], systems[i]) for i in missing]
    for i, answered in zip(missing, found, strict=True):
        store.put(keys[i], answered.record())
    for question, key in zip(questions, keys, strict=True):
        yield question, store.of(key)


def _weigh(runtime: Runtime, store: Store, question: Question, system: System) -> tuple[float, ...]:
    """Log probability of each choice as the complete answer, including EOS."""
    choices = question.parts[0].sample.choices
    key = store.key("choices", question.prompt, choices, system.options)
    record = store.get(key)
    if record is None:
        scores = runtime.score(question.prompt, choices, ends=True, **system.options)
        record = {"logprobs": [score.logprob for score in scores]}
        store.put(key, record)
    return tuple(record["logprobs"])
