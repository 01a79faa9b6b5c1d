"""Word by word tokenizing, each word once: most words of a text have been seen before.

The router is asked at every sentence, and a call of the tokenizer costs more than its network.
"""

from __future__ import annotations

from itertools import chain

from tokenizers import Tokenizer

MEMORY = 200_000  # characters of the words remembered; beyond, all are forgotten
# What a tokenizer that works word by word reads the same in either way.
PROBE = "Who, me? It's 3.5 km - naïve (isn't it) Yes:no A1b2"


class WordEncoder:
    """The ids of texts, as the tokenizer gives them; white space is one space.

    Tokenizers that do not work word by word (GPT-2's, whose words begin with their space) are
    found by a probe, and asked for whole texts as they are.
    """

    def __init__(self, tokenizer: Tokenizer, memory: int = MEMORY) -> None:
        self._tokenizer = tokenizer
        self._words = _Words(tokenizer, memory)
        self._by_words = self._in_words(PROBE) == _ids(tokenizer, PROBE)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._in_words(text) if self._by_words else _ids(self._tokenizer, text)

    def _in_words(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._words.__getitem__, text.split())))


class _Words(dict[str, list[int]]):
    """The ids of words; what is missing is asked for."""

    def __init__(self, tokenizer: Tokenizer, memory: int) -> None:
        self._tokenizer = tokenizer
        self._memory = memory
        self._characters = 0

    def __missing__(self, word: str) -> list[int]:
        self._characters += len(word)
        if self._characters > self._memory:
            self.clear()
            self._characters = len(word)
        found = self[word] = _ids(self._tokenizer, word)
        return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found
