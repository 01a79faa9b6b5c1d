"""What is asked of a bundle, and the systems that answer: base, single, multi, dlp."""

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
# Over the longest response of a task: room for an answer that says the same in more words.
ROOM_FACTOR, ROOM_MARGIN = 1.25, 8


@dataclass(frozen=True)
class Part:
    """One sample of a task, inside a question."""

    task: str
    sample: Sample


@dataclass(frozen=True)
class Question:
    """A prompt with what it asks for: one part, or several one after the other.

    Attributes:
        room: the most tokens of an answer.
    """

    parts: tuple[Part, ...]
    prompt: str
    room: int


@dataclass(frozen=True)
class System:
    """A way to answer: its name, and the options of `Runtime.generate`."""

    name: str
    options: GenerateOptions


def rooms_of(
    tasks: Sequence[EvalTask], count_tokens: Callable[[str], int], most: int
) -> dict[str, int]:
    """The most tokens that an answer of each task may have, the same for all systems: what its
    longest response has and a quarter more, `most` at most."""
    longest = {
        task.name: max(count_tokens(sample.response) for sample in task.samples) for task in tasks
    }
    return {
        name: min(most, int(ROOM_FACTOR * tokens) + ROOM_MARGIN) for name, tokens in longest.items()
    }


def plain_questions(tasks: Sequence[EvalTask], rooms: Mapping[str, int]) -> list[Question]:
    """Each sample as it is."""
    return [
        Question((Part(task.name, sample),), sample.prompt, rooms[task.name])
        for task in tasks
        for sample in task.samples
    ]


def bare_questions(tasks: Sequence[EvalTask], rooms: Mapping[str, int]) -> list[Question]:
    """Each sample without its task's instruction line and its list of choices, where it has any."""
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
    """Samples of `count` different tasks in one prompt, in random order. Every sample is used
    once, as far as there are others to join it with."""
    rng = random.Random(f"{seed} joined {count}")
    left = {task.name: list(task.samples) for task in tasks}
    questions: list[Question] = []
    while True:
        # Tasks with most samples left first, so that few are left over; ties at random.
        names = sorted(left, key=lambda name: (-len(left[name]), rng.random()))[:count]
        if len(names) < count or not left[names[-1]]:
            return questions
        rng.shuffle(names)
        parts = tuple(Part(name, left[name].pop(0)) for name in names)
        prompt = JOIN.join(part.sample.prompt for part in parts)
        questions.append(Question(parts, prompt, sum(rooms[name] for name in names)))


def task_groups(tasks: Sequence[EvalTask], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """The tasks in random groups of `count`; the last takes tasks again if they do not divide."""
    names = [task.name for task in tasks]
    random.Random(f"{seed} groups {count}").shuffle(names)
    starts = range(0, len(names), count)
    return [tuple((names[at : at + count] + names)[:count]) for at in starts]
