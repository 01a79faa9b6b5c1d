"""Cache token ids by word: most words of a text have been tokenized before.

The router runs at every sentence, and a tokenizer call costs more than its network.
"""

from __future__ import annotations

from itertools import chain

from tokenizers import Tokenizer

CACHE_CHARACTERS = 200_000  # of all cached words; beyond, the cache is cleared
# A tokenizer that splits at white space gives this text the same ids word by word.
PROBE = "Who, me? It's 3.5 km - naïve (isn't it) Yes:no A1b2"


class CachingEncoder:
    """Tokenizes text word by word and caches the ids; a run of white space counts as one space.

    Tokenizers that do not work word by word (GPT-2's, whose words include the leading space) are
    recognised by a probe and encode whole texts, without the cache.

    Args:
        capacity: characters of all cached words.
    """

    def __init__(self, tokenizer: Tokenizer, capacity: int = CACHE_CHARACTERS) -> None:
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._characters = 0
        self._cache: dict[str, list[int]] = {}
        self._is_wordwise = self._encode_words(PROBE) == self._encode_whole(PROBE)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._encode_words(text) if self._is_wordwise else self._encode_whole(text)

    def _encode_whole(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_words(self, text: str) -> list[int]:
        words = text.split()
        return list(chain.from_iterable(map(self._cached(words).__getitem__, words)))

    def _cached(self, words: list[str]) -> dict[str, list[int]]:
        """The cache, with all of these words in it."""
        cache = self._cache
        new = [word for word in dict.fromkeys(words) if word not in cache]
        if new:
            self._characters += sum(map(len, new))
            if self._characters > self._capacity:
                new = list(dict.fromkeys(words))
                cache = self._cache = {}  # another thread may still read the old dict
                self._characters = sum(map(len, new))
            cache.update(self._encode_separately(new))
        return cache

    def _encode_separately(self, words: list[str]) -> dict[str, list[int]]:
        """The ids of each word, from one tokenizer call: a call costs more than a word."""
        encoding = self._tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
        ids: dict[str, list[int]] = {word: [] for word in words}
        for index, token in zip(encoding.word_ids, encoding.ids, strict=True):
            if index is not None:  # None marks special tokens
                ids[words[index]].append(token)
        return ids
