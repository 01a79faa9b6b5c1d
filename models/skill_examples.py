"""Samples of a skill as token sequences to learn from, alone and in prompts for two skills."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dlp_edge.tasks.samples import Sample
from dlp_edge.untrusted.chat_template import ChatTemplate

OPENING_TOKENS = 3
JOINS = (" ", "\n", "\nThen: ", " And then: ", " Also, ", "\n\n")


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the loss covers predicting it."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class PromptFormat:
    """How a backbone reads a request and ends an answer: as in the bundle that it is for."""

    tokenizer: Tokenizer
    template: ChatTemplate
    bos_token: str
    eos_token: str

    def prompt(self, text: str) -> list[int]:
        """The ids of a request, up to the start of the answer."""
        messages = [{"role": "user", "content": text}]
        rendered = self.template.render(messages, self.bos_token, self.eos_token)
        ids: list[int] = self.tokenizer.encode(
            rendered, add_special_tokens=self.template.is_plain
        ).ids
        return ids

    def answer(self, text: str, ends: bool = True) -> list[int]:
        """The ids of an answer, with its end."""
        text += self.eos_token if ends else ""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def single(form: PromptFormat, sample: Sample) -> Example:
    """A request and its answer, which the loss covers."""
    start, answer = form.prompt(sample.prompt), form.answer(sample.response)
    return Example(start + answer, [False] * len(start) + [True] * len(answer))


def pair(form: PromptFormat, first: Sample, second: Sample, own: int | None, join: str) -> Example:
    """Two requests in one prompt, and both answers.

    The loss covers what skill `own` (0 or 1) has to write: its sentences, the first token of the
    sentence after them (the runtime changes the fusion only when it has seen that token), and the
    opening tokens of the whole answer, which are written under a blend of both. All of it where
    one adapter writes both (None).
    """
    start = form.prompt(first.prompt + join + second.prompt)
    answers = (form.answer(first.response + "\n", ends=False), form.answer(second.response))
    if own is None:
        learn = [True] * (len(answers[0]) + len(answers[1]))
    elif own == 0:
        learn = [True] * len(answers[0]) + [True] + [False] * (len(answers[1]) - 1)
    else:
        opening = min(OPENING_TOKENS, len(answers[0]))
        learn = [True] * opening + [False] * (len(answers[0]) - opening)
        learn += [False] + [True] * (len(answers[1]) - 1)
    return Example(start + answers[0] + answers[1], [False] * len(start) + learn)


def skill_examples(
    form: PromptFormat,
    samples: Sequence[Sample],
    others: Mapping[str, Sequence[Sample]],
    pairs: int,
    rng: random.Random,
) -> list[Example]:
    """Every sample alone, and one in `pairs` beside a request for another skill.

    Args:
        others: the samples of other skills; without any, and with `pairs` 0, there are no pairs.
    """
    examples = [single(form, sample) for sample in samples]
    tasks = [task for task in others.values() if task]
    for index, sample in enumerate(samples[::pairs] if pairs and tasks else []):
        other = rng.choice(rng.choice(tasks))
        own = index % 2
        first, second = (sample, other) if own == 0 else (other, sample)
        examples.append(pair(form, first, second, own, rng.choice(JOINS)))
    return examples


def examples_for_all(
    form: PromptFormat, tasks: Mapping[str, Sequence[Sample]], pairs: int, rng: random.Random
) -> list[Example]:
    """What the tasks' own adapters learn, in one: every sample alone, some of them in pairs."""
    samples = [sample for task in tasks.values() for sample in task]
    examples = [single(form, sample) for sample in samples]
    for sample in samples[::pairs] if pairs else []:
        other = rng.choice(tasks[rng.choice(list(tasks))])
        first, second = rng.sample((sample, other), 2)
        examples.append(pair(form, first, second, None, rng.choice(JOINS)))
    return examples


def in_batches(examples: Sequence[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Batches of at most `tokens` with their padding, of about equal lengths, in random order."""
    grouped: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: (len(example.ids), rng.random())):
        if grouped[-1] and (len(grouped[-1]) + 1) * len(example.ids) > tokens:
            grouped.append([])
        grouped[-1].append(example)
    rng.shuffle(grouped)
    return grouped
