"""How people put several requests into one prompt: what stands before, between and after them."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Held out: measured on, never taught.
HELD_OUT_JOINS = (
    *(" After that, ", " One more thing: ", " Oh, and ", ", plus: ", "\nOnce done, ", " Lastly: "),
    *(
        "\n\n== 2 ==\n",
        "\n>> ",
        " while you are at it, ",
        ", furthermore ",
        "\n(ii) ",
        "; besides, ",
    ),
)
_GAPS = (" ",) * 4 + ("\n",) * 3 + ("\n\n",) * 3 + ("  ",)
_CONNECTORS = (
    *("And", "Then", "And then", "Also", "And also", "Next", "Now", "Afterwards", "Second"),
    *("Secondly", "Finally", "In addition", "Another thing", "Further", "Another question", "Then"),
    *("Please also", "Can you also", "Could you then", "I also need this", "And another one"),
    *("Next question", "Next task", "Additionally", "Besides that", "Moreover", "Last", "Third"),
    *("And please", "As well", "Second thing", "Step two", "P.S.", "PS", "Okay, now", "When done"),
    *("After this", "At the same time", "On top of that", "Number two", "And one more", "Oh also"),
)
_ENDINGS = (" ",) * 4 + (", ",) * 4 + (": ",) * 4 + (" - ", ":\n", ":\n\n", "... ", "; ")
_INLINE = (
    *(
        ", and ",
        " and ",
        " and then ",
        ", and then ",
        ", then ",
        " then ",
        "; ",
        " also ",
        ", also ",
    ),
    *(", ", " & ", " plus ", " - ", " / ", " as well as ", ", and also ", "; then ", " and also "),
    *(" next ", " (and then) ", ", please also ", " and please ", ", but first ", " but also "),
)
_RULES = ("---", "***", "===", "___", "* * *", "###", "--", "~~~", "-----------", "|")
_BULLETS = ("- ", "* ", "• ", "+ ", "– ", "> ", "-> ", "[ ] ")
_NUMBERS = ("{n}. ", "{n}) ", "({n}) ", "{n}: ", "{a}) ", "{A}. ", "({a}) ", "#{n} ", "{n} - ")
_HEADINGS = ("Task {n}: ", "Question {n}: ", "Request {n}:\n", "Step {n}. ", "### {n}\n", "Q{n}: ")
_ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth")
_INTRODUCTIONS = (
    *("Please do the following:", "I need a few things.", "Could you help me with these?"),
    *("Do these for me:", "Two things:", "Some questions for you:", "Hi! A few requests:"),
    *("Here is my list:", "I have several questions.", "Please answer all of these.", "To do:"),
    *("Could you please take care of these?", "Hey, quick ones:", "Answer each in turn:"),
)
_OPENINGS = ("Hi, ", "Hello! ", "Hey, ", "Please ", "Good morning. ", "Hi there! ", "OK. ", "So, ")
_CLOSINGS = (
    *(" Thanks!", " Thank you.", "\nThanks", "\n\nThank you very much!", " Cheers", " please"),
    *(" Thanks in advance.", "\nThat's all.", " That is all, thank you.", " :)", " Please."),
)
_LISTED, _RULED, _INLINED, _CONNECTED = 0.22, 0.06, 0.3, 0.32  # the rest is white space alone


@dataclass(frozen=True)
class Frame:
    """What stands around n requests: `before[i]` before the i-th, `after` behind the last.

    `inline[i]` is whether the i-th goes on within the sentence of the one before.
    """

    before: tuple[str, ...]
    inline: tuple[bool, ...]
    after: str


def draw_frame(count: int, rng: random.Random, held_out: bool = False) -> Frame:
    """A frame for so many requests, of one style or of a style for each join."""
    if held_out:
        unseen = [rng.choice(HELD_OUT_JOINS) for _ in range(count - 1)]
        return Frame(("", *unseen), (False,) * count, "")
    if count > 1 and rng.random() < _LISTED:
        return _list(count, rng)
    first = rng.choice(_OPENINGS) if rng.random() < 0.08 else ""
    joins = [_join(rng) for _ in range(count - 1)]
    after = rng.choice(_CLOSINGS) if rng.random() < 0.08 else ""
    return Frame(
        (first, *(text for text, _ in joins)), (False, *(inline for _, inline in joins)), after
    )


def _join(rng: random.Random) -> tuple[str, bool]:
    """What stands between two requests, and whether it stays within the sentence."""
    draw = rng.random()
    if draw < _RULED:
        return f"\n{rng.choice(_RULES)}\n", False
    if draw < _RULED + _INLINED:
        return rng.choice(_INLINE), True
    if draw < _RULED + _INLINED + _CONNECTED:
        connector = rng.choice(_CONNECTORS)
        if rng.random() < 0.15:
            connector = connector.lower()
        return rng.choice(_GAPS) + connector + rng.choice(_ENDINGS), False
    if draw < 0.72:  # a mark before the later requests only
        return rng.choice(("\n", "\n\n", " ")) + _mark(rng)(rng.choice((1, 2))), False
    return rng.choice(_GAPS), False


def _list(count: int, rng: random.Random) -> Frame:
    mark = _mark(rng)
    gap = rng.choice(("\n", "\n", "\n\n", " "))
    first = ""
    if rng.random() < 0.4:
        first = rng.choice(_INTRODUCTIONS) + rng.choice(("\n", "\n\n", " "))
    marks = [mark(at) for at in range(count)]
    before = (first + marks[0], *(gap + each for each in marks[1:]))
    after = rng.choice(_CLOSINGS) if rng.random() < 0.08 else ""
    return Frame(before, (False,) * count, after)


def _mark(rng: random.Random) -> _Mark:
    return _Mark(rng)


class _Mark:
    """The marks of a list, all of one kind."""

    def __init__(self, rng: random.Random) -> None:
        draw = rng.random()
        kinds = _BULLETS if draw < 0.35 else _NUMBERS if draw < 0.75 else _HEADINGS
        self._form = rng.choice(kinds)
        self._ordinal = rng.choice((", ", ": ", " ")) if draw > 0.88 else ""

    def __call__(self, at: int) -> str:
        if self._ordinal:
            return _ORDINALS[at] + self._ordinal
        letter = "abcdefgh"[at]
        return self._form.format(n=at + 1, a=letter, A=letter.upper())
