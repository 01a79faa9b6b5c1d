"""Text of none of the tasks, which a router learns to leave to the base model.

It comes from four sources: a file of short texts of many kinds, a grammar of everyday sentences
and requests (`grammar_texts`), Python's own library and manual, and noise. Texts are joined, cut,
mixed and misspelt, so that what is learned is "like none of the tasks" rather than the texts.
"""

from __future__ import annotations

import pydoc_data.topics
import random
import string
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources

from dlp_edge.models.training_texts.augmentation import cut, with_typos
from dlp_edge.models.training_texts.documents import python_modules
from dlp_edge.models.training_texts.grammar_texts import SMALL_TALK, from_grammar
from dlp_edge.models.training_texts.scope import Scope

SOURCE_STEP = 4  # every fourth module is code enough
HELD_OUT = 8  # every eighth text is measured on, not taught
GIVEN_SHARE = 0.3  # of all texts, where the user gives some
SMALL_TALK_SHARE = 0.3
SMALL_TALK_PROBES = 60  # texts of each kind of small talk, to see whether a skill is about it
SMALL_TALK_CLAIMED = 0.15  # of them; beyond, the kind is in scope
TRIES = 20
GRAMMAR_SHARES = {
    "sentences": 0.42,
    "requests": 0.22,
    "records": 0.15,
    "foreign": 0.13,
    "tasks": 0.08,
}
_SIGNS = string.ascii_letters + string.digits + "!?.,;:-_#%&/()=+*<>[]{}$@'~^|\\¿¡§¶•ªº–œ∑®†¥øπéüñß"


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    """The texts of the package's file, by kind."""
    found: dict[str, tuple[str, ...]] = {}
    content = (
        resources.files("dlp_edge.models.training_texts")
        .joinpath("out_of_scope.txt")
        .read_text("utf-8")
    )
    for section in content.split("\n== "):
        kind, _, body = section.removeprefix("== ").partition("\n")
        found[kind] = tuple(text.strip("\n") for text in body.split("\n\n") if text.strip())
    return found


@cache
def _sources() -> tuple[tuple[str, ...], ...]:
    """The lines of Python modules."""
    chosen = sorted(python_modules(), key=lambda path: path.name)[::SOURCE_STEP]
    return tuple(tuple(path.read_text("utf-8", "replace").split("\n")) for path in chosen)


@cache
def _manual() -> tuple[str, ...]:
    """The paragraphs of Python's manual."""
    pages = (page for _, page in sorted(pydoc_data.topics.topics.items()))
    return tuple(part for page in pages for part in page.split("\n\n") if len(part) > 60)


class OutOfScopeTexts:
    """Makes text of none of the tasks.

    Args:
        held_out: True makes it of the texts that are measured on, False of all others.
        scope: what the tasks are about; texts that it covers are not made.
        given: texts of the user's own, which a part of all is made of.
    """

    def __init__(self, held_out: bool, scope: Scope, given: Sequence[str] = ()) -> None:
        self._scope = scope
        self._given = given
        self._small_talk = [kind for kind in SMALL_TALK if not _is_claimed(kind, scope)]
        self._kinds = {
            kind: [text for i, text in enumerate(texts) if (i % HELD_OUT == 5) == held_out]
            for kind, texts in kinds().items()
        }
        self.texts = [text for texts in self._kinds.values() for text in texts]
        self._words = [word for text in self.texts for word in text.split()]

    def make(self, rng: random.Random) -> str:
        """One text that no task is about."""
        for _ in range(TRIES):
            text = self._draw(rng)
            if not self._scope.covers(text):
                break
        return text

    def _draw(self, rng: random.Random) -> str:
        """The user's own texts and small talk; or whole texts, made-up ones, code, a page of a
        manual, a heap of words, noise."""
        if self._given and rng.random() < GIVEN_SHARE:
            return _varied(rng.choice(self._given), rng)
        if self._small_talk and rng.random() < SMALL_TALK_SHARE:
            return _varied(from_grammar(rng.choice(self._small_talk), rng).strip(), rng)
        draw = rng.random()
        if draw < 0.30:
            return self._some_texts(rng)
        if draw < 0.68:
            return _some_from_grammar(rng)
        if draw < 0.75:
            return _code(rng)
        if draw < 0.79:
            return cut(rng.choice(_manual()), rng)
        if draw < 0.83:
            return " ".join(rng.choices(self._words, k=rng.randint(1, 40)))
        if draw < 0.88:
            return " ".join(self.snippet(rng) for _ in range(rng.randint(1, 4)))
        return _noise(rng)

    def snippet(self, rng: random.Random) -> str:
        """Two to ten words in a row of one text, such as people say before they ask."""
        text = from_grammar("sentences", rng) if rng.random() < 0.5 else rng.choice(self.texts)
        words = text.split()
        count = rng.randint(2, 10)
        start = rng.randint(0, max(0, len(words) - count))
        return " ".join(words[start : start + count])

    def request(self, rng: random.Random) -> str:
        """What people ask of an assistant."""
        if rng.random() < 0.5:
            return from_grammar("requests", rng)
        return rng.choice(self._kinds["requests"])

    def task(self, rng: random.Random) -> str:
        """What people say before they give somebody a text to work on."""
        return from_grammar("tasks", rng)

    def reply(self, rng: random.Random) -> str:
        """What a base model may answer: one or two texts."""
        return " ".join(rng.choices(self.texts, k=rng.randint(1, 2)))

    def _some_texts(self, rng: random.Random) -> str:
        same_kind = self._kinds[rng.choice(sorted(self._kinds))] or self.texts
        count = rng.choice((1, 1, 1, 2, 3))
        text = rng.choice((" ", "\n")).join(rng.choices(same_kind, k=count))
        return cut(text, rng) if rng.random() < 0.3 else _varied(text, rng)


def _is_claimed(kind: str, scope: Scope) -> bool:
    """Whether a task is about a kind of small talk."""
    rng = random.Random(0)
    claimed = sum(scope.covers(from_grammar(kind, rng)) for _ in range(SMALL_TALK_PROBES))
    return claimed > SMALL_TALK_CLAIMED * SMALL_TALK_PROBES


def _varied(text: str, rng: random.Random) -> str:
    """The text, sometimes with typing errors or in small letters."""
    draw = rng.random()
    if draw < 0.15:
        return with_typos(text, rng)
    return text.lower() if draw < 0.25 else text


def _some_from_grammar(rng: random.Random) -> str:
    (kind,) = rng.choices(tuple(GRAMMAR_SHARES), tuple(GRAMMAR_SHARES.values()))
    count = rng.choice((1, 1, 2, 3, 4, 6) if kind == "sentences" else (1, 1, 2))
    text = rng.choice((" ", " ", "\n")).join(from_grammar(kind, rng) for _ in range(count))
    return _varied(text, rng)


def random_pieces(count: int, vocab_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Token ids drawn evenly: what a piece says without company, which is nothing."""
    for _ in range(count):
        yield [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]


def _code(rng: random.Random) -> str:
    lines: Sequence[str] = rng.choice(_sources())
    count = rng.randint(1, 12)
    start = rng.randrange(max(1, len(lines) - count))
    return "\n".join(lines[start : start + count]).strip("\n") or "import os"


def _noise(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        signs = string.ascii_lowercase if rng.random() < 0.6 else _SIGNS
        words = (
            "".join(rng.choices(signs, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 20))
        )
        return " ".join(words)
    if draw < 0.5:
        few = rng.choices(rng.choice(_manual()).split(), k=rng.randint(1, 3))
        return " ".join(rng.choices(few, k=rng.randint(1, 12)))
    if draw < 0.65:
        return "".join(rng.choices(rng.choices(_SIGNS, k=3), k=rng.randint(1, 20)))
    return "".join(
        rng.choice(_SIGNS) * rng.choice((1, 1, 1, 1, 3)) for _ in range(rng.randint(1, 80))
    )
