"""Prompts of one to five requests, with what each of their characters belongs to."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dlp_edge.models.router_examples import bare_forms
from dlp_edge.models.splitter.joins import draw_frame
from dlp_edge.models.splitter.leaning import draw_introduction, draw_leaning
from dlp_edge.models.tasks import Task
from dlp_edge.models.training_texts.augmentation import cut, with_typos
from dlp_edge.models.training_texts.documents import draw_document
from dlp_edge.models.training_texts.out_of_scope import OutOfScopeTexts
from dlp_edge.models.training_texts.scope import Scope

COUNTS, COUNT_SHARES = (1, 2, 3, 4, 5), (0.32, 0.34, 0.2, 0.09, 0.05)
BARE_SHARE = 0.45
OTHER_SHARE = 0.1  # of the requests are for none of the tasks
LEANING_SHARE = 0.14  # of the later requests lean on an earlier one
INTRODUCED_SHARE = 0.07  # of the prompts of several requests begin with what all of them need
DOCUMENT_SHARE = 0.5  # of the prompts of one request are about a long document
PASTED_SHARE = 0.06  # of the parts of other prompts are about a shorter one
PASTED = 1500  # characters
ENDED_SHARE = 0.35  # of the requests without a mark at their end get one
LOWER_SHARE, BARE_ENDS_SHARE, TYPO_SHARE = 0.15, 0.12, 0.08
SAME_TASK_SHARE = 0.15  # of the prompts may have several requests for one task
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DOCUMENT_TASKS = (
    *("Summarise this text:", "Translate the following.", "What is this about?", "Proofread:"),
    *("Read this and tell me what you think.", "Please shorten the text below.", "Explain this:"),
)


@dataclass(frozen=True)
class Span:
    """A request: text[start:end] of its composite.

    Attributes:
        label: of its task; the number of tasks is out-of-scope; None is not known.
        leans: whether it needs what came before.
        is_introduction: whether it is no request, but what all requests need.
    """

    start: int
    end: int
    label: int | None
    leans: bool = False
    is_introduction: bool = False


@dataclass(frozen=True)
class Composite:
    """A prompt with its requests; the text between them is glue."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Part:
    text: str
    label: int | None
    leans: bool = False
    is_introduction: bool = False


class CompositeMaker:
    """Makes composites of one split of the tasks."""

    def __init__(
        self, tasks: Sequence[Task], split: Literal["train", "dev"], rng: random.Random
    ) -> None:
        self._rng = rng
        scope = Scope(sample.prompt for task in tasks for sample in task.train)
        self._others = OutOfScopeTexts(split == "dev", scope)
        self._by_task: list[list[tuple[str, ...]]] = []
        for task in tasks:
            samples = task.train if split == "train" else task.dev
            self._by_task.append(
                [(each.prompt.strip(), *bare_forms(task.common, each)) for each in samples]
            )

    def make(self) -> Composite:
        """A composite for training."""
        rng = self._rng
        (count,) = rng.choices(COUNTS, COUNT_SHARES)
        if count == 1:
            return self._single()
        distinct = rng.random() >= SAME_TASK_SHARE
        parts: list[_Part] = []
        labels = self._labels(count, distinct)
        for at, label in enumerate(labels):
            if at and rng.random() < LEANING_SHARE:
                parts.append(_Part(draw_leaning(rng), None, leans=True))
            else:
                parts.append(self._part(label))
        if rng.random() < INTRODUCED_SHARE:
            introduction = draw_introduction(self._others, rng)
            parts.insert(0, _Part(introduction, None, is_introduction=True))
        return self._joined(parts)

    def held_out(self, count: int, bare: bool, unseen_joins: bool) -> Composite:
        """A composite to measure on: of `count` tasks, with or without their instructions and
        choices."""
        parts = []
        for label in self._labels(count, distinct=True):
            forms = self._rng.choice(self._by_task[label])
            parts.append(_Part(forms[-1] if bare else forms[0], label))
        frame = draw_frame(count, self._rng, unseen_joins)
        return _compose(parts, frame.before, frame.after)

    def _labels(self, count: int, distinct: bool) -> list[int]:
        known = range(len(self._by_task))
        if distinct and count <= len(known):
            return self._rng.sample(known, count)
        return self._rng.choices(known, k=count)

    def _part(self, label: int) -> _Part:
        rng = self._rng
        if rng.random() < OTHER_SHARE:
            return _Part(self._others.request(rng).strip(), len(self._by_task))
        if rng.random() < PASTED_SHARE:
            return _Part(self._about(draw_document(rng, PASTED)), None)
        forms = rng.choice(self._by_task[label])
        text = rng.choice(forms[1:]) if len(forms) > 1 and rng.random() < BARE_SHARE else forms[0]
        if rng.random() < TYPO_SHARE:
            text = with_typos(text, rng)
        return _Part(text, label)

    def _single(self) -> Composite:
        rng = self._rng
        if rng.random() >= DOCUMENT_SHARE:
            part = self._part(rng.randrange(len(self._by_task)))
            if rng.random() < 0.2:
                part = _Part(cut(part.text, rng), part.label)
            elif rng.random() < 0.1:
                part = _Part(self._others.make(rng).strip(), len(self._by_task))
            return self._joined([part])
        if rng.random() < 0.25:
            document = "\n\n".join(self._others.make(rng) for _ in range(rng.randint(2, 8)))
            return self._joined([_Part(self._about(document), len(self._by_task))])
        # Some skill may be for it: no label.
        return self._joined([_Part(self._about(draw_document(rng)), None)])

    def _about(self, document: str) -> str:
        """A request that gives a document, before or after it; sometimes the document alone."""
        rng = self._rng
        asked = rng.choice(_DOCUMENT_TASKS) if rng.random() < 0.5 else self._others.task(rng)
        draw = rng.random()
        gap = rng.choice(("\n\n", "\n\n", "\n", " "))
        if draw < 0.08:
            return document.strip()
        text = f"{asked}{gap}{document}" if draw < 0.7 else f"{document}{gap}{asked}"
        return text.strip()

    def _joined(self, parts: Sequence[_Part]) -> Composite:
        rng = self._rng
        frame = draw_frame(len(parts), rng)
        parts = list(parts)
        draw = rng.random()
        for at, part in enumerate(parts):
            text = part.text
            if text[-1:].isalnum() and rng.random() < ENDED_SHARE:
                text += rng.choice("..?!")
            if at + 1 < len(parts) and frame.inline[at + 1] and rng.random() < 0.7:
                text = text.rstrip(".!") or text
            if frame.inline[at] and text[1:2].islower() and rng.random() < 0.6:
                text = text[:1].lower() + text[1:]
            if draw < LOWER_SHARE:
                text = text.lower()
            elif draw < LOWER_SHARE + BARE_ENDS_SHARE:
                text = text.lower().rstrip(string.punctuation) or text
                if len(text) < 120:
                    text = text.translate(_PUNCTUATION).strip() or text
            parts[at] = _Part(text, part.label, part.leans, part.is_introduction)
        before, after = frame.before, frame.after
        if draw < LOWER_SHARE + BARE_ENDS_SHARE:
            before, after = tuple(each.lower() for each in before), after.lower()
        return _compose(parts, before, after)


def _compose(parts: Sequence[_Part], before: Sequence[str], after: str) -> Composite:
    text, spans = "", []
    for part, glue in zip(parts, before, strict=True):
        text += glue
        start = len(text)
        text += part.text
        spans.append(Span(start, len(text), part.label, part.leans, part.is_introduction))
    return Composite(text + after, tuple(spans))
