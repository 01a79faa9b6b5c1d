"""Routing examples: what the router will read at run time, and the adapters that should answer.

At a prompt it reads the user's text alone. At a sentence start it reads the user's text and the
answer so far, up to and including the first token of the new sentence. Where a prompt asks for
two or three skills, the sentences of the answer belong to different adapters.

A task's fixed wording (its instruction, its list of choices) is a shortcut that users will not
type, so samples are also shown without it.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dlp_edge.models.tasks import Sample, Task
from dlp_edge.runtime.sentences import SentenceSplitter

JOINS = (" ", "\n", "\nThen: ", " And then: ", " Also, ", "\n\n")
ANSWER_JOINS = ("\n",) * 6 + ("\n\n", " ")  # adapters end their part with a new line, mostly

COMMON_SHARE = 0.05  # of a task's prompts: wording shared by as many is fixed wording
COMMON_WORDS = 40  # the longest fixed beginning or end, in words
CHOICE_MARK_WORDS = 2  # "choice:", "- (a)": what may stand before a choice on its line
LEFT_WORDS = 3  # a prompt with fewer words left is no sample any more

TRIPLE_SHARE = 0.2  # of the composite prompts ask for three skills, the others for two
BARE_SHARE = 0.3  # of the parts of composite prompts come without their fixed wording
PIECE_SHARE = 0.4  # of the sentences are cut within their first word, as language models do
MAX_EXAMPLES = 60_000
COMPOSITES_PER_SAMPLE = 2
HELD_OUT_COMPOSITES = 1_000

_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Example:
    """A routing question and its answer: each of `labels` is right, in equal parts."""

    prompt: str
    generated: str
    labels: tuple[int, ...]


class CommonText:
    """The wording that a task's prompts have in common: lines, beginnings and ends."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._least = max(2.0, COMMON_SHARE * len(prompts))
        self._lines = self._frequent(line for prompt in prompts for line in set(_lines(prompt)))
        words = [self._without_lines(prompt).split() for prompt in prompts]
        self._heads = self._frequent(head for each in words for head in _heads(each))
        self._tails = self._frequent(tail for each in words for tail in _heads(each[::-1]))

    def strip(self, sample: Sample) -> str | None:
        """The prompt without what is common and without its list of choices.

        None where nothing was removed or too little is left.
        """
        prompt = self._without_lines(sample.prompt, sample.choices)
        words = prompt.split()
        begin = max((len(head) for head in _heads(words) if head in self._heads), default=0)
        cut = max((len(tail) for tail in _heads(words[::-1]) if tail in self._tails), default=0)
        if len(words) - begin - cut < LEFT_WORDS:
            return None
        spans = [match.span() for match in re.finditer(r"\S+", prompt)]
        bare = prompt[spans[begin][0] : spans[len(words) - cut - 1][1]]
        return None if bare == sample.prompt.strip() else bare

    def _frequent(self, items: Iterable[object]) -> set[object]:
        return {item for item, count in Counter(items).items() if count >= self._least}

    def _without_lines(self, prompt: str, choices: Sequence[str] = ()) -> str:
        offered = {choice.strip().casefold() for choice in choices}
        return "\n".join(
            line
            for line in prompt.split("\n")
            if line.strip() not in self._lines and not _lists_choice(line, offered)
        )


def _lines(prompt: str) -> list[str]:
    """The lines of a prompt of several; a one-line prompt has no line to spare."""
    lines = [line.strip() for line in prompt.split("\n") if line.strip()]
    return lines if len(lines) > 1 else []


def _heads(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The beginnings of a text, from one word on."""
    return (tuple(words[:count]) for count in range(1, min(len(words), COMMON_WORDS) + 1))


def _lists_choice(line: str, choices: set[str]) -> bool:
    words = line.casefold().split()
    return any(
        " ".join(words[skip:]) in choices for skip in range(min(CHOICE_MARK_WORDS, len(words)) + 1)
    )


@dataclass(frozen=True)
class Part:
    """A sample with its label and, if it has one, its prompt without the fixed wording."""

    label: int
    sample: Sample
    bare: str | None


@dataclass(frozen=True)
class HeldOut:
    """Examples that are measured on, by kind."""

    prompts: list[Example]
    bare_prompts: list[Example]
    blends: list[Example]
    sentences: list[Example]


def training_examples(tasks: Sequence[Task], rng: random.Random) -> list[Example]:
    """Every training sample alone, with and without its fixed wording, then at its sentence
    starts and in composites, until there are about MAX_EXAMPLES."""
    by_task = _parts(tasks, "train")
    pool = [part for parts in by_task for part in parts]
    examples = [*_prompts(pool), *_bare_prompts(pool)]
    for _ in range(COMPOSITES_PER_SAMPLE):
        for part in rng.sample(pool, len(pool)):
            if len(examples) >= MAX_EXAMPLES:
                return examples
            mixed = _mixed_parts(part, by_task, rng)
            examples += [*_sentences([part], rng), _blend(mixed, rng), *_sentences(mixed, rng)]
    return examples


def held_out_examples(tasks: Sequence[Task], rng: random.Random) -> HeldOut:
    """The dev samples alone, with and without their fixed wording, and in composites."""
    by_task = _parts(tasks, "dev")
    pool = [part for parts in by_task for part in parts]
    chosen = rng.sample(pool, min(len(pool), HELD_OUT_COMPOSITES))
    mixes = [_mixed_parts(part, by_task, rng) for part in chosen]
    return HeldOut(
        prompts=_prompts(pool),
        bare_prompts=_bare_prompts(pool),
        blends=[_blend(mixed, rng) for mixed in mixes],
        sentences=[example for mixed in mixes for example in _sentences(mixed, rng)],
    )


def _parts(tasks: Sequence[Task], split: Literal["train", "dev"]) -> list[list[Part]]:
    """The samples of one split, by label; what is common is that of the training split."""
    by_task: list[list[Part]] = []
    for label, task in enumerate(tasks):
        common = CommonText([sample.prompt for sample in task.train])
        samples = task.train if split == "train" else task.dev
        by_task.append([Part(label, sample, common.strip(sample)) for sample in samples])
    return by_task


def _prompts(parts: Sequence[Part]) -> list[Example]:
    return [Example(part.sample.prompt, "", (part.label,)) for part in parts]


def _bare_prompts(parts: Sequence[Part]) -> list[Example]:
    return [Example(part.bare, "", (part.label,)) for part in parts if part.bare is not None]


def _mixed_parts(first: Part, by_task: Sequence[Sequence[Part]], rng: random.Random) -> list[Part]:
    """`first` and, in any order, samples of one or two other tasks."""
    others = [label for label in range(len(by_task)) if label != first.label]
    count = 2 if rng.random() < TRIPLE_SHARE else 1
    labels = rng.sample(others, min(count, len(others)))
    parts = [first, *(rng.choice(by_task[label]) for label in labels)]
    rng.shuffle(parts)
    return parts


def _blend(parts: Sequence[Part], rng: random.Random) -> Example:
    """A prompt that asks for all of the parts, before anything is answered."""
    return Example(_joined_prompt(parts, rng), "", tuple(part.label for part in parts))


def _sentences(parts: Sequence[Part], rng: random.Random) -> list[Example]:
    """The parts' prompt and their answers, one after another, up to the first token of each
    sentence after the first; the label is that of the part which the sentence belongs to."""
    prompt = _joined_prompt(parts, rng)
    answer = ""
    ends: list[int] = []
    for part in parts:
        answer += (rng.choice(ANSWER_JOINS) if answer else "") + part.sample.response
        ends.append(len(answer))
    return [
        Example(
            prompt,
            answer[: _first_token_end(answer, start, rng)],
            (parts[bisect_right(ends, start)].label,),
        )
        for start in SentenceSplitter().feed(answer)
    ]


def _joined_prompt(parts: Sequence[Part], rng: random.Random) -> str:
    prompts = [
        part.bare if part.bare and rng.random() < BARE_SHARE else part.sample.prompt
        for part in parts
    ]
    return prompts[0] + "".join(rng.choice(JOINS) + prompt for prompt in prompts[1:])


def _first_token_end(text: str, start: int, rng: random.Random) -> int:
    """Where the first token of the sentence at `start` ends: its first word, or a part of it."""
    match = _WORD.match(text, start)
    end = match.end() if match else start + 1
    return rng.randint(start + 1, end) if rng.random() < PIECE_SHARE else end
