"""Whether a short text is one of the skills' own requests in almost the same words.

Out-of-scope texts that a skill claims would teach the router to refuse what the skill is for: a
"Thanks!" is small talk unless some skill answers thanks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

MAX_WORDS = 12  # longer texts do not coincide by chance
SIMILARITY = 0.6  # of the words of both texts are common to both (Jaccard)
_WORD = re.compile(r"\w+(?:'\w+)?")


class Scope:
    """The short prompts of all skills, as sets of words."""

    def __init__(self, prompts: Iterable[str]) -> None:
        found = {words for words in map(_words, prompts) if 0 < len(words) <= 2 * MAX_WORDS}
        self._prompts = sorted(found, key=sorted)
        self._holding: dict[str, list[int]] = defaultdict(list)
        for index, words in enumerate(self._prompts):
            for word in words:
                self._holding[word].append(index)

    def covers(self, text: str) -> bool:
        """Whether a short text has SIMILARITY with the prompt of a skill."""
        words = _words(text)
        if not 0 < len(words) <= MAX_WORDS:
            return False
        # A prompt that is similar enough holds one of the text's rarest words at least.
        rarest = sorted(words, key=lambda word: (len(self._holding.get(word, ())), word))
        checked: set[int] = set()
        for word in rarest[: int((1 - SIMILARITY) * len(words)) + 1]:
            for index in self._holding.get(word, ()):
                if index not in checked:
                    checked.add(index)
                    prompt = self._prompts[index]
                    common = len(words & prompt)
                    if common >= SIMILARITY * (len(words) + len(prompt) - common):
                        return True
        return False


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.casefold()))
