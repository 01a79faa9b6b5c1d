"""Guesses at how an answer goes on, from the text before it: prompt lookup, without a model.

Knows no backbone: the loop (`generation.py`) lets one pass check a whole guess.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3  # tokens that a place must have in common with the end of the text to be looked up
WORTH = 0.85  # guesses are drafted once they come true so often
TRUST = 0.3  # in an answer's first guess
PACE = 0.2  # the weight of the newest guess in what guesses are trusted


class PromptLookup:
    """Proposes what followed where the text went before as it goes now.

    Every token is guessed, drafted or not, so whether guesses come true is known before one is
    paid for. Reading a token takes the same time whatever came before.

    Args:
        prompt: the token ids that the answer follows.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # GRAM tokens -> where they last ended
        self._source: int | None = (
            None  # where the text went as it goes now: the next token's place
        )
        self._trust = TRUST  # how often guesses came true, the newest counting most
        self._prompt_length = len(prompt)
        for token in prompt:
            self._read(token)
        self._trust = TRUST  # a prompt that repeats itself says nothing of the answer

    def propose(self, answer: Sequence[int], most: int) -> list[int]:
        """So many tokens that may follow an answer; none where that is not likely enough.

        Args:
            answer: all of it so far: it goes on from the one of the call before.
        """
        for token in answer[len(self._text) - self._prompt_length :]:
            self._read(token)
        if self._source is None or self._trust < WORTH:
            return []
        # What is copied may reach into the copy itself: then it repeats.
        period = len(self._text) - self._source
        return [self._text[self._source + i % period] for i in range(most)]

    def _read(self, token: int) -> None:
        """Judges the guess at a token, and looks for a place to copy from where there is none."""
        if self._source is not None:
            right = self._text[self._source] == token
            self._trust += PACE * (right - self._trust)
            self._source = self._source + 1 if right else None
        self._text.append(token)
        gram = tuple(self._text[-GRAM:])
        if self._source is None:
            self._source = self._behind.get(gram)
        self._behind[gram] = len(self._text)
