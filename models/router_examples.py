"""Routing examples: what the router will read at run time, and the adapters that should answer.

At a prompt it reads the user's text alone. At a sentence start it reads the user's text and the
answer so far, up to and including the first token of the new sentence. Where a prompt asks for
two or three skills, the sentences of the answer belong to different adapters.

A task's fixed wording (its instruction, its list of choices) is a shortcut that users will not
type, so samples are also shown without it, and augmented.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dlp_edge.models.tasks import Task
from dlp_edge.models.training_texts.augmentation import cut, with_gaps, with_typos
from dlp_edge.models.training_texts.out_of_scope import OutOfScopeTexts
from dlp_edge.models.training_texts.scope import Scope
from dlp_edge.runtime.text.sentences import SentenceSplitter
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample

# Of the samples, in an epoch's examples; what is left out once is not left out of composites.
WHOLE_SHARE, BARE_SHARE, AUGMENTED_SHARE = 0.5, 0.8, 0.8
COMPOSITES = 1.0  # for each sample
TRIPLE_SHARE = 0.45  # of the composites ask for three skills, the others for two
SENTENCES_EACH = 2  # of a composite's sentences
SINGLE_SHARE = 0.15  # of the composites' first samples are also answered alone
OTHER_SHARE = 0.16  # of all examples, as many more are of none of the tasks
OTHER_PART = 0.06  # of the composites ask for something that none of the tasks is about
BARE_PARTS = 0.35  # of the parts of a composite come without their fixed wording
LOWER_SHARE = 0.3  # of all examples are in lower case, as many people type
PIECE_SHARE = 0.4  # of the sentences are cut within their first word, as language models do
MAX_SAMPLES = 20_000  # more are thinned out, so that training takes no longer
# A skill is shown as often at least, whole or augmented, so that many skills of few examples are
# learned, and rare ones beside common ones. MAX_PROMPTS bounds the time that many skills take.
LEAST_PROMPTS = 2_000
MAX_PROMPTS = 300_000
COUNTED_ANSWERS = 60  # of a task, to see how many sentences they have
HELD_OUT_COMPOSITES = 300

# What will be answered first is mostly what was asked first; under nucleus selection (p = 0.6) the
# first sentence is a blend all the same.
BLENDS = {2: (0.58, 0.42), 3: (0.42, 0.31, 0.27)}
JOINS = (
    *(" ", "\n", "\n\n", "\nThen: ", " And then: ", " Also, ", "\n2. ", " Next: ", "\nSecond: "),
    "\n---\n",
)
ANSWER_JOINS = ("\n",) * 4 + ("\n\n", " ", " ")  # adapters end their part with a new line, mostly
SMALL_TALK_ENDS = (" ", ". ", ": ", "\n", ", ", "! ")
_WORD = re.compile(r"\w+|[^\w\s]+")

# Held out: none of these is in the training examples.
ASK_ANOTHER_WAY = (
    "Please have a look at this one and give me the answer.",
    "I need your help here, what would you say?",
    "Work this out for me:",
    "Could you solve the following?",
)
CHAT_TURNS = ("thanks! and now: ", "great, that helped. next one - ", "ok cool. ", "One more: ")


@dataclass(frozen=True)
class Example:
    """A routing question and its answer: label -> weight; the weights sum to 1. The label after
    the last one's is out-of-scope."""

    prompt: str
    generated: str
    weights: dict[int, float]

    @property
    def label(self) -> int:
        """The label with the most weight."""
        return max(self.weights, key=lambda label: self.weights[label])


@dataclass(frozen=True)
class Part:
    """A sample with its label, and its prompt without the fixed wording, if it has some: without
    all of it first, then perhaps without the lines and choices alone."""

    label: int
    sample: Sample
    bare: tuple[str, ...]


class ExampleMaker:
    """Makes examples of one split of the tasks; what is common is that of the training split."""

    def __init__(
        self,
        tasks: Sequence[Task],
        split: Literal["train", "dev"],
        rng: random.Random,
        out_of_scope: Sequence[str] = (),
    ) -> None:
        self._rng = rng
        scope = Scope(sample.prompt for task in tasks for sample in task.train)
        self._others = OutOfScopeTexts(split == "dev", scope, out_of_scope)
        self.out_of_scope = len(tasks)
        self._by_task: list[list[Part]] = []
        for label, task in enumerate(tasks):
            samples = task.train if split == "train" else task.dev
            self._by_task.append(
                [Part(label, each, bare_forms(task.common, each)) for each in samples]
            )
        self._pool = [part for parts in self._by_task for part in parts]
        # Where answers have more sentences there is more to route.
        self._sentence_weights = [math.sqrt(_mean_sentences(parts)) for parts in self._by_task]

    def training(self) -> list[Example]:
        """What a router is taught: prompts in three forms, composites, other texts. Those that
        share a prompt follow each other."""
        rng = self._rng
        pool = rng.sample(self._pool, min(len(self._pool), MAX_SAMPLES))
        groups = [[each] for part in pool for each in self._singles(part)]
        groups += [self._composite() for _ in range(int(COMPOSITES * len(pool)))]
        others = int(OTHER_SHARE * sum(map(len, groups)))
        groups += [[each] for each in self.others(others)]
        for _ in range(others // 5):
            part = self._other_part()
            groups.append(_sentences([part], part.sample.prompt, rng, most=2))
        return [
            each
            for group in groups
            for each in (map(_lower, group) if rng.random() < LOWER_SHARE else group)
        ]

    def balanced(self, seen: Counter[int]) -> list[Example]:
        """Further prompts of the skills that have been shown less than LEAST_PROMPTS times, in
        the forms of `training`, with as large a share of other texts.

        Args:
            seen: how many examples each label is the most likely answer of.
        """
        least = min(LEAST_PROMPTS, MAX_PROMPTS // len(self._by_task))
        found: list[Example] = []
        for label, parts in enumerate(self._by_task):
            missing = least - seen[label]
            while missing > 0:
                singles = [
                    each
                    for part in self._rng.sample(parts, len(parts))
                    for each in self._singles(part)
                ]
                found += singles[:missing]
                missing -= len(singles)
        others = self.others(int(OTHER_SHARE * len(found)))
        return [
            _lower(each) if self._rng.random() < LOWER_SHARE else each for each in found + others
        ]

    def _singles(self, part: Part) -> list[Example]:
        rng = self._rng
        found = []
        if rng.random() < WHOLE_SHARE or (not part.bare and rng.random() < BARE_SHARE):
            found.append(_alone(part, part.sample.prompt))
        if part.bare and rng.random() < BARE_SHARE:
            found.append(_alone(part, rng.choice(part.bare)))
        if rng.random() < AUGMENTED_SHARE:
            found.append(_alone(part, self._augmented(part)))
        return found

    def prompts(self) -> list[Example]:
        return [_alone(part, part.sample.prompt) for part in self._pool]

    def bare_prompts(self) -> list[Example]:
        return [_alone(part, part.bare[0]) for part in self._pool if part.bare]

    def reworded(self) -> list[Example]:
        """With a request of other words in the place of the fixed wording."""
        return [
            _alone(part, f"{self._rng.choice(ASK_ANOTHER_WAY)}\n{part.bare[0]}")
            for part in self._pool
            if part.bare
        ]

    def misspelt(self) -> list[Example]:
        return [_alone(part, with_typos(part.sample.prompt, self._rng)) for part in self._pool]

    def chat_turns(self) -> list[Example]:
        """In the middle of a conversation."""
        return [
            _alone(part, self._rng.choice(CHAT_TURNS) + part.sample.prompt) for part in self._pool
        ]

    def composites(self, count: int, tasks_each: int) -> tuple[list[Example], list[Example]]:
        """Prompts that ask for several skills: before anything is answered, and at the sentences
        after the first."""
        blends, sentences = [], []
        for _ in range(count):
            parts = self._mixed(self._drawn(), tasks_each, with_others=False)
            prompt = self._joined(parts, bare=0.0)
            blends.append(_blend(parts, prompt))
            sentences += _sentences(parts, prompt, self._rng)
        return blends, sentences

    def others(self, count: int) -> list[Example]:
        """Text of none of the tasks."""
        return [
            Example(self._others.make(self._rng), "", {self.out_of_scope: 1.0})
            for _ in range(count)
        ]

    def _composite(self) -> list[Example]:
        rng = self._rng
        first = self._drawn()
        parts = self._mixed(first, 3 if rng.random() < TRIPLE_SHARE else 2, with_others=True)
        prompt = self._joined(parts, BARE_PARTS)
        examples = [_blend(parts, prompt)]
        examples += _sentences(parts, prompt, rng, SENTENCES_EACH)
        if rng.random() < SINGLE_SHARE:
            alone = self._worded(first, 0.5)
            examples += _sentences([first], alone, rng, SENTENCES_EACH)
        return examples

    def _drawn(self) -> Part:
        (parts,) = self._rng.choices(self._by_task, self._sentence_weights)
        return self._rng.choice(parts)

    def _mixed(self, first: Part, count: int, with_others: bool) -> list[Part]:
        """`first` and, in any order, samples of other tasks."""
        parts = [first]
        while len(parts) < min(count, len(self._by_task)):
            part = self._drawn()
            if part.label not in [each.label for each in parts]:
                parts.append(part)
        if with_others and self._rng.random() < OTHER_PART:
            parts[-1] = self._other_part()
        self._rng.shuffle(parts)
        return parts

    def _other_part(self) -> Part:
        sample = Sample(self._others.make(self._rng), self._others.reply(self._rng))
        return Part(self.out_of_scope, sample, ())

    def _worded(self, part: Part, bare: float) -> str:
        """A part's prompt, in so many cases without its fixed wording."""
        if part.bare and self._rng.random() < bare:
            return self._rng.choice(part.bare)
        return part.sample.prompt

    def _joined(self, parts: Sequence[Part], bare: float) -> str:
        rng = self._rng
        prompts = [self._worded(part, bare) for part in parts]
        return prompts[0] + "".join(rng.choice(JOINS) + prompt for prompt in prompts[1:])

    def _augmented(self, part: Part) -> str:
        rng = self._rng
        text = self._worded(part, 0.6)
        draw = rng.random()
        if draw < 0.3:
            text = with_typos(text, rng)
        elif draw < 0.5:
            text = cut(text, rng)
        elif draw < 0.6:
            text = with_gaps(text, rng)
        if draw >= 0.6 or rng.random() < 0.3:
            talk = rng.choice((self._others.task, self._others.request, self._others.snippet))(rng)
            before = rng.random() < 0.75
            text = talk + rng.choice(SMALL_TALK_ENDS) + text if before else f"{text} {talk}"
        return text


def bare_forms(common: CommonText, sample: Sample) -> tuple[str, ...]:
    forms = (common.strip(sample, lines_only) for lines_only in (False, True))
    return tuple(dict.fromkeys(form for form in forms if form is not None))


def _lower(example: Example) -> Example:
    return replace(example, prompt=example.prompt.lower(), generated=example.generated.lower())


def _alone(part: Part, prompt: str) -> Example:
    return Example(prompt, "", {part.label: 1.0})


def _blend(parts: Sequence[Part], prompt: str) -> Example:
    """A prompt that asks for all of the parts, before anything is answered."""
    weights = BLENDS[len(parts)] if len(parts) > 1 else (1.0,)
    return Example(
        prompt, "", {part.label: weight for part, weight in zip(parts, weights, strict=True)}
    )


def _sentences(
    parts: Sequence[Part], prompt: str, rng: random.Random, most: int | None = None
) -> list[Example]:
    """The parts' answers, one after another, up to the first token of each sentence after the
    first; the label is that of the part which the sentence belongs to.

    Args:
        most: of them, drawn at random; the first sentence of one of the later parts is added.
    """
    answer = ""
    ends: list[int] = []
    for part in parts:
        answer += (rng.choice(ANSWER_JOINS) if answer else "") + part.sample.response
        ends.append(len(answer))
    starts = SentenceSplitter().feed(answer)
    if most is not None and len(starts) > most:
        firsts = [at for at in starts if any(0 <= at - end <= 2 for end in ends)]
        chosen = set(rng.sample(starts, most)) | set(rng.sample(firsts, min(1, len(firsts))))
        starts = sorted(chosen)
    return [
        Example(
            prompt,
            answer[: _first_token_end(answer, start, rng)],
            {parts[bisect_right(ends, start)].label: 1.0},
        )
        for start in starts
    ]


def _first_token_end(text: str, start: int, rng: random.Random) -> int:
    """Where the first token of the sentence at `start` ends: its first word, or a part of it."""
    match = _WORD.match(text, start)
    end = match.end() if match else start + 1
    return rng.randint(start + 1, end) if rng.random() < PIECE_SHARE else end


def _mean_sentences(parts: Sequence[Part]) -> float:
    answers = [part.sample.response for part in parts[:COUNTED_ANSWERS]]
    return sum(1 + len(SentenceSplitter().feed(answer)) for answer in answers) / len(answers)
