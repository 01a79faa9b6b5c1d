"""Where sentences start in a stream of text.

The decision is taken at the first character of the next sentence, from the text up to it: so it
is the same however the stream is cut into pieces.
"""

from __future__ import annotations

import re

# Stops that need white space after them, stops that need none (CJK), and what may close a
# sentence after its stop.
STOPS = ".!?…"
WIDE_STOPS = "。！？｡"
CLOSERS = "\"'”’»)]}*_`」』）】"
OPENERS = "\"'“‘«([{*_`「『（【"

ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon sr jr st mt vs etc e.g i.e eg ie cf ca approx ed eds al dept inc "
    "ltd co corp jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# Words that are abbreviations only before a number ("No. 5", but "No. It is not.").
BEFORE_NUMBERS = frozenset("no nos vol p pp fig figs eq sec ch".split())

_LAST_WORD = re.compile(r"([^\s" + re.escape(OPENERS) + r"]+)$")
_LIST_MARK = re.compile(r"(?:^|\n)\s*(?:\d{1,3}|[A-Za-z])$")


class SentenceSplitter:
    """Finds the starts of sentences in a stream.

    `feed` takes the next piece and returns the offsets, in characters from the beginning of the
    stream, at which sentences after the first one start.
    """

    def __init__(self) -> None:
        self._seen = ""  # the running sentence, from its start
        self._offset = 0  # where it starts in the stream

    def feed(self, piece: str) -> list[int]:
        starts: list[int] = []
        for character in piece:
            if not character.isspace() and _ends_sentence(self._seen, character):
                self._offset += len(self._seen)
                self._seen = ""
                starts.append(self._offset)
            self._seen += character
        return starts


def _ends_sentence(text: str, following: str) -> bool:
    """Is `text` a whole sentence, now that `following` (not white space) comes after it?"""
    body = text.rstrip()
    gap = text[len(body) :]
    if not body:
        return False
    if "\n" in gap:
        return True
    core = body.rstrip(CLOSERS)
    if not core:
        return False
    if core[-1] in WIDE_STOPS:
        return following not in CLOSERS + WIDE_STOPS
    if core[-1] not in STOPS or not gap:
        return False
    if following.islower():
        return False
    return core[-1] != "." or not _is_abbreviation(core, following)


def _is_abbreviation(core: str, following: str) -> bool:
    """Does the stop at the end of `core` belong to an abbreviation, an initial or a list mark?"""
    before = core[:-1]
    if not before or before.endswith("."):
        return False  # an ellipsis; before a capital it ends the sentence
    match = _LAST_WORD.search(before)
    if match is None:
        return False
    word = match.group(1)
    if word.lower() in BEFORE_NUMBERS:
        return following.isdigit()
    initial = len(word) == 1 and word.isalpha() and word.isupper() and word != "I"
    return initial or word.lower() in ABBREVIATIONS or _LIST_MARK.search(before) is not None
