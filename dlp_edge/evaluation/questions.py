"""Evaluation questions, and the systems that answer them: base, single, multi, dlp."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dlp_edge.evaluation.tasks import EvalTask
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample

SYSTEMS = ("base", "single", "multi", "dlp")
JOIN = "\n\n"  # between the questions of one prompt
# Token limit relative to the longest response of a task: leaves room for wordier answers.
ROOM_FACTOR, ROOM_MARGIN = 1.25, 8


@dataclass(frozen=True)
class Part:
    """One sample of a task, inside a question."""

    task: str
    sample: Sample


@dataclass(frozen=True)
class Question:
    """A prompt that asks one part, or several in order.

    Attributes:
        room: maximum tokens of the answer.
    """

    parts: tuple[Part, ...]
    prompt: str
    room: int


@dataclass(frozen=True)
class System:
    """A system under evaluation: its name and its options for `Runtime.generate`."""

    name: str
    options: GenerateOptions


def rooms_of(
    tasks: Sequence[EvalTask], count_tokens: Callable[[str], int], most: int
) -> dict[str, int]:
    """Maximum answer tokens of each task, equal for all systems: those of its longest response
    times ROOM_FACTOR plus ROOM_MARGIN, limited to `most`."""
    longest = {
        task.name: max(count_tokens(sample.response) for sample in task.samples) for task in tasks
    }
    return {
        name: min(most, int(ROOM_FACTOR * tokens) + ROOM_MARGIN) for name, tokens in longest.items()
    }


def plain_questions(tasks: Sequence[EvalTask], rooms: Mapping[str, int]) -> list[Question]:
    """One question per sample, unchanged."""
    return [
        Question((Part(task.name, sample),), sample.prompt, rooms[task.name])
        for task in tasks
        for sample in task.samples
    ]


def bare_questions(tasks: Sequence[EvalTask], rooms: Mapping[str, int]) -> list[Question]:
    """Each sample without the instruction line and the list of choices, if it has them."""
    questions = []
    for task in tasks:
        common = CommonText(task.prompts)
        for sample in task.samples:
            bare = common.strip(sample)
            if bare is not None:
                part = Part(task.name, sample)
                questions.append(Question((part,), bare, rooms[task.name]))
    return questions


def joined_questions(
    tasks: Sequence[EvalTask], count: int, rooms: Mapping[str, int], seed: int = 0
) -> list[Question]:
    """Samples of `count` different tasks in one prompt, in random order. Each sample is used at
    most once."""
    rng = random.Random(f"{seed} joined {count}")
    left = {task.name: list(task.samples) for task in tasks}
    questions: list[Question] = []
    while True:
        # Take tasks with the most samples left first, so that few remain; break ties at random.
        names = sorted(left, key=lambda name: (-len(left[name]), rng.random()))[:count]
        if len(names) < count or not left[names[-1]]:
            return questions
        rng.shuffle(names)
        parts = tuple(Part(name, left[name].pop(0)) for name in names)
        prompt = JOIN.join(part.sample.prompt for part in parts)
        questions.append(Question(parts, prompt, sum(rooms[name] for name in names)))


def task_groups(tasks: Sequence[EvalTask], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """The tasks in random groups of `count`; the last is filled up with earlier tasks."""
    names = [task.name for task in tasks]
    random.Random(f"{seed} groups {count}").shuffle(names)
    starts = range(0, len(names), count)
    return [tuple((names[at : at + count] + names)[:count]) for at in starts]
