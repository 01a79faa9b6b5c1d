"""Incremental detokenization and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_TOKENS = 4  # bytes of a UTF-8 character, so at most as many tokens


class Detokenizer:
    """Turns generated ids into text piece by piece, never splitting a character.

    Each step decodes the ids of the last piece together with the new ones, since the text of an id
    depends on its neighbours (spaces, bytes).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._previous: list[int] = []  # ids of the last piece
        self._pending: list[int] = []  # ids not yet returned as text

    def step(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._pending.append(token)
        piece = self._new_text()
        if piece.endswith(INCOMPLETE) and len(self._pending) < MAX_CHARACTER_TOKENS:
            return ""
        if piece:
            self._previous, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """The pending ids' text; an incomplete character becomes the replacement character."""
        return self._new_text() if self._pending else ""

    def _new_text(self) -> str:
        prefix = self._decode(self._previous)
        return self._decode(self._previous + self._pending)[len(prefix) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopMatcher:
    """Cuts text at the first stop string; holds back text that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """The text that is safe to return: it cannot be part of a stop string."""
        text = self._held + piece
        matches = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.matched, self._held = True, ""
            return text[: min(matches)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The held-back text, once generation has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
