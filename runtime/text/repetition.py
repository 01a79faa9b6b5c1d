"""Finds answers that loop: small models repeat themselves until their tokens are spent."""

from __future__ import annotations

from collections.abc import Sequence

REPEATS = 3
MAX_PERIOD = 4  # sentences of a block that repeats


class RepetitionDetector:
    """Watches a text's sentences for a block of one to MAX_PERIOD that comes REPEATS times in a
    row, word for word."""

    def __init__(self) -> None:
        self._start = 0  # of the running sentence
        self._recent: list[tuple[str, ...]] = []  # the words of the latest sentences

    def feed(self, text: str, starts: Sequence[int]) -> int | None:
        """Whether a loop is complete, as the offset where the sentence after it starts.

        Args:
            text: all of the text so far.
            starts: the offsets at which new sentences start in it.
        """
        for start in starts:
            self._recent.append(tuple(text[self._start : start].split()))
            self._start = start
            del self._recent[: -REPEATS * MAX_PERIOD]
            if any(self._repeats(period) for period in range(1, MAX_PERIOD + 1)):
                return start
        return None

    def _repeats(self, period: int) -> bool:
        tail = self._recent[-REPEATS * period :]
        block = tail[:period]
        # Rulers, bullets and columns of numbers may repeat.
        says_something = any(sign.isalpha() for words in block for word in words for sign in word)
        return len(tail) == REPEATS * period and tail == block * REPEATS and says_something
