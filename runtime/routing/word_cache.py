"""Word by word tokenizing, each word once: most words of a text have been seen before.

The router is asked at every sentence, and a call of the tokenizer costs more than its network.
"""

from __future__ import annotations

from itertools import chain

from tokenizers import Tokenizer

CACHE_CHARACTERS = 200_000  # characters of the words remembered; beyond, all are forgotten
# What a tokenizer that works word by word reads the same in either way.
PROBE = "Who, me? It's 3.5 km - naïve (isn't it) Yes:no A1b2"


class CachingEncoder:
    """The ids of texts, as the tokenizer gives them; white space is one space.

    Tokenizers that do not work word by word (GPT-2's, whose words begin with their space) are
    found by a probe, and asked for whole texts as they are.
    """

    def __init__(self, tokenizer: Tokenizer, capacity: int = CACHE_CHARACTERS) -> None:
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._characters = 0
        self._known: dict[str, list[int]] = {}
        self._by_words = self._in_words(PROBE) == self._whole(PROBE)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._in_words(text) if self._by_words else self._whole(text)

    def _whole(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _in_words(self, text: str) -> list[int]:
        words = text.split()
        return list(chain.from_iterable(map(self._knowing(words).__getitem__, words)))

    def _knowing(self, words: list[str]) -> dict[str, list[int]]:
        """What is remembered, with the ids of these words."""
        known = self._known
        new = [word for word in dict.fromkeys(words) if word not in known]
        if new:
            self._characters += sum(map(len, new))
            if self._characters > self._capacity:
                new = list(dict.fromkeys(words))
                known = self._known = {}  # another thread may still read the old ones
                self._characters = sum(map(len, new))
            known.update(self._separately(new))
        return known

    def _separately(self, words: list[str]) -> dict[str, list[int]]:
        """The ids of each word, in one call: a call costs more than a word."""
        found = self._tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
        ids: dict[str, list[int]] = {word: [] for word in words}
        for index, token in zip(found.word_ids, found.ids, strict=True):
            if index is not None:  # as it is for special tokens alone
                ids[words[index]].append(token)
        return ids
