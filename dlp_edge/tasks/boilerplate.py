"""Boilerplate of a task's prompts: shared instruction lines, prefixes, suffixes and choices.

Users will not type it, and a router can use it as a shortcut. So routers are also trained and
evaluated on prompts without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from dlp_edge.tasks.samples import Sample

COMMON_SHARE = 0.05  # wording in at least this share of a task's prompts is boilerplate
COMMON_WORDS = 40  # maximum length of a shared prefix or suffix, in words
CHOICE_MARK_WORDS = 2  # maximum words before a choice on its line, such as "choice:" or "- (a)"
SHORT_WORDS = 12  # tasks with a shorter median prompt are left as they are
MIN_WORDS = 2  # minimum words that must remain of a prompt


class CommonText:
    """The lines, prefixes and suffixes that a task's prompts share."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._min_count = max(2.0, COMMON_SHARE * len(prompts))
        self._lines = self._frequent(line for prompt in prompts for line in set(_lines(prompt)))
        lengths = [len(prompt.split()) for prompt in prompts]
        self._short = not lengths or median(lengths) < SHORT_WORDS
        words = [self._without_lines(prompt).split() for prompt in prompts]
        self._prefixes = self._common_prefixes(words)
        self._suffixes = self._common_prefixes([each[::-1] for each in words])

    def strip(self, sample: Sample, lines_only: bool = False) -> str | None:
        """Returns the prompt without shared wording and without its list of choices.

        Args:
            lines_only: remove only shared lines and choices, not prefixes and suffixes.

        Returns:
            None if nothing was removed, too little remains, or the task's prompts are short:
            what short prompts share is mostly the request itself.
        """
        if self._short:
            return None
        prompt = self._without_lines(sample.prompt, sample.choices)
        words = prompt.split()
        begin = cut = 0
        if not lines_only:
            begin, cut = _longest(words, self._prefixes), _longest(words[::-1], self._suffixes)
        if len(words) - begin - cut < MIN_WORDS:
            return None
        spans = [match.span() for match in re.finditer(r"\S+", prompt)]
        bare = prompt[spans[begin][0] : spans[len(words) - cut - 1][1]]
        return None if bare == sample.prompt.strip() else bare

    def _frequent(self, items: Iterable[object]) -> set[object]:
        return {item for item, count in Counter(items).items() if count >= self._min_count}

    def _common_prefixes(self, texts: Sequence[Sequence[str]]) -> set[object]:
        """Returns the prefixes that enough texts share, of 1 to COMMON_WORDS words."""
        prefixes: set[object] = set()
        for count in range(1, COMMON_WORDS + 1):
            texts = [words for words in texts if len(words) >= count]
            frequent = self._frequent(tuple(words[:count]) for words in texts)
            texts = [words for words in texts if tuple(words[:count]) in frequent]
            prefixes |= frequent
        return prefixes

    def _without_lines(self, prompt: str, choices: Sequence[str] = ()) -> str:
        offered = {choice.strip().casefold() for choice in choices}
        return "\n".join(
            line
            for line in prompt.split("\n")
            if line.strip() not in self._lines and not _lists_choice(line, offered)
        )


def _lines(prompt: str) -> list[str]:
    """Returns the non-empty lines of a multi-line prompt; none for a one-line prompt."""
    lines = [line.strip() for line in prompt.split("\n") if line.strip()]
    return lines if len(lines) > 1 else []


def _longest(words: Sequence[str], prefixes: set[object]) -> int:
    """Returns the length of the longest prefix in `prefixes`, which is closed under shortening."""
    count = 0
    while tuple(words[: count + 1]) in prefixes and count < len(words):
        count += 1
    return count


def _lists_choice(line: str, choices: set[str]) -> bool:
    words = line.casefold().split()
    return any(
        " ".join(words[skip:]) in choices for skip in range(min(CHOICE_MARK_WORDS, len(words)) + 1)
    )
