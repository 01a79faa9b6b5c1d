"""From token ids to text, piece by piece: whole characters, and stop strings held back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens at the most


class Detokenizer:
    """Turns generated ids into text piece by piece, never splitting a character.

    Each step decodes a short window: the ids given out last (what a decoder makes of an id
    depends on its neighbours: spaces, bytes) and the new ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # given out last
        self._held: list[int] = []  # not given out yet

    def step(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._held.append(token)
        piece = self._new_text()
        if piece.endswith(UNFINISHED) and len(self._held) < LONGEST_CHARACTER:
            return ""
        if piece:
            self._before, self._held = self._held, []
        return piece

    def finish(self) -> str:
        """What is left: an unfinished character, as the replacement character."""
        return self._new_text() if self._held else ""

    def _new_text(self) -> str:
        known = self._decode(self._before)
        return self._decode(self._before + self._held)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopMatcher:
    """Holds back text that may become a stop string, and cuts at the first that does."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """The text that is safe to give out now."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once it is known that no stop string follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
