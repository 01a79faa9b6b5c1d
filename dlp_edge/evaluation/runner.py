"""Working through a plan: all systems of a question one after the other, in turning order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlp_edge.evaluation.answers import Answered, ask
from dlp_edge.evaluation.plan import EvalSettings, Plan
from dlp_edge.evaluation.questions import Question, System
from dlp_edge.evaluation.store import Store
from dlp_edge.runtime.runtime import Runtime

Tell = Callable[[str, float], None]  # what is being done, and which part of all is done


@dataclass(frozen=True)
class Answers:
    """What was answered: (question, name of the system) -> answer, and -> the log probability
    of each of its choices."""

    found: dict[tuple[Question, str], Answered]
    weighed: dict[tuple[Question, str], tuple[float, ...]]

    def of(self, question: Question, system: str) -> Answered | None:
        """The answer, where the system answered the question."""
        return self.found.get((question, system))


def run_plan(
    runtime: Runtime, plan: Plan, store: Store, settings: EvalSettings, tell: Tell
) -> Answers:
    """Asks all that the store does not know yet.

    All tasks are mixed in one stream, in a seeded order. The systems of a question follow one
    another, each question beginning with the next system, so that what else the machine does
    hits all of them alike.
    """
    rounds = list(plan.systems.items())
    random.Random(f"{settings.seed} order").shuffle(rounds)
    total = sum(map(len, plan.systems.values())) + sum(map(len, plan.weighed.values()))
    found: dict[tuple[Question, str], Answered] = {}
    weighed: dict[tuple[Question, str], tuple[float, ...]] = {}
    warm = False
    for number, (question, systems) in enumerate(rounds):
        for system in _turned(list(systems.values()), number):
            key = store.key("answer", question.prompt, question.room, system.options)
            record = store.get(key)
            if record is None:
                if not warm:  # the first pass of a process is slower than all others
                    ask(runtime, question, system)
                    warm = True
                record = ask(runtime, question, system).record()
                store.put(key, record)
            found[question, system.name] = Answered.of_record(record)
            tell(f"{question.parts[0].task}, {system.name}", len(found) / total)
    for question, systems in plan.weighed.items():
        for system in systems.values():
            weighed[question, system.name] = _weigh(runtime, store, question, system)
            task = question.parts[0].task
            tell(f"{task}, {system.name}, choices", (len(found) + len(weighed)) / total)
    return Answers(found, weighed)


def _weigh(runtime: Runtime, store: Store, question: Question, system: System) -> tuple[float, ...]:
    """log p of each choice as the whole answer, its end included."""
    choices = question.parts[0].sample.choices
    key = store.key("choices", question.prompt, choices, system.options)
    record = store.get(key)
    if record is None:
        scores = runtime.score(question.prompt, choices, ends=True, **system.options)
        record = {"logprobs": [score.logprob for score in scores]}
        store.put(key, record)
    return tuple(record["logprobs"])


def _turned(systems: Sequence[System], number: int) -> list[System]:
    at = number % len(systems) if systems else 0
    return [*systems[at:], *systems[:at]]
