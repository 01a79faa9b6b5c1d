"""How users type what task files say neatly: with typing errors, in part, after small talk."""

from __future__ import annotations

import random
import re
import string

TYPO_SHARES = (0.03, 0.08, 0.15)  # of the words
DROP_SHARES = (0.1, 0.25)
LEAST_KEPT = 0.35  # of the words of a text that is cut
SHORT = 16  # words; shorter texts are not cut
_WORD = re.compile(r"\S+")


def with_typos(text: str, rng: random.Random) -> str:
    """The text with letters swapped, lost, doubled or wrong in some words."""
    share = rng.choice(TYPO_SHARES)
    return _WORD.sub(lambda word: _typo(word[0], rng) if rng.random() < share else word[0], text)


def with_gaps(text: str, rng: random.Random) -> str:
    """The text without some of its words."""
    share = rng.choice(DROP_SHARES)
    return " ".join(word for word in text.split(" ") if rng.random() > share) or text


def cut(text: str, rng: random.Random) -> str:
    """A long text without its beginning or its end."""
    spans = [word.span() for word in _WORD.finditer(text)]
    if len(spans) < SHORT:
        return text
    kept = rng.randint(max(5, int(LEAST_KEPT * len(spans))), len(spans))
    start = rng.choice((0, len(spans) - kept, rng.randint(0, len(spans) - kept)))
    return text[spans[start][0] : spans[start + kept - 1][1]]


def _typo(word: str, rng: random.Random) -> str:
    if len(word) < 3:
        return word
    at = rng.randrange(len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :]
