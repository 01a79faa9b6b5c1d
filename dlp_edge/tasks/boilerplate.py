"""The wording that a task's prompts share: an instruction line, a beginning, an end, the choices.

It is a shortcut that users will not type, so routers are also taught and measured without it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from dlp_edge.tasks.samples import Sample

COMMON_SHARE = 0.05  # of a task's prompts: wording shared by as many is fixed wording
COMMON_WORDS = 40  # the longest fixed beginning or end, in words
CHOICE_MARK_WORDS = 2  # "choice:", "- (a)": what may stand before a choice on its line
SHORT_WORDS = 12  # a task whose prompts are shorter in the median has no wording to spare
LEFT_WORDS = 2  # a prompt with fewer words left is no sample any more


class CommonText:
    """The wording that a task's prompts have in common: lines, beginnings and ends."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._least = max(2.0, COMMON_SHARE * len(prompts))
        self._lines = self._frequent(line for prompt in prompts for line in set(_lines(prompt)))
        lengths = [len(prompt.split()) for prompt in prompts]
        self._short = not lengths or median(lengths) < SHORT_WORDS
        words = [self._without_lines(prompt).split() for prompt in prompts]
        self._heads = self._common_heads(words)
        self._tails = self._common_heads([each[::-1] for each in words])

    def strip(self, sample: Sample, lines_only: bool = False) -> str | None:
        """The prompt without what is common and without its list of choices; or only without the
        common lines and the choices.

        None where nothing was removed, too little is left, or the task's prompts are short: what
        such prompts share is mostly what they ask for.
        """
        if self._short:
            return None
        prompt = self._without_lines(sample.prompt, sample.choices)
        words = prompt.split()
        begin = cut = 0
        if not lines_only:
            begin, cut = _longest(words, self._heads), _longest(words[::-1], self._tails)
        if len(words) - begin - cut < LEFT_WORDS:
            return None
        spans = [match.span() for match in re.finditer(r"\S+", prompt)]
        bare = prompt[spans[begin][0] : spans[len(words) - cut - 1][1]]
        return None if bare == sample.prompt.strip() else bare

    def _frequent(self, items: Iterable[object]) -> set[object]:
        return {item for item, count in Counter(items).items() if count >= self._least}

    def _common_heads(self, texts: Sequence[Sequence[str]]) -> set[object]:
        """The beginnings that enough texts share, of one word, then of one more each time."""
        found: set[object] = set()
        for count in range(1, COMMON_WORDS + 1):
            texts = [words for words in texts if len(words) >= count]
            frequent = self._frequent(tuple(words[:count]) for words in texts)
            texts = [words for words in texts if tuple(words[:count]) in frequent]
            found |= frequent
        return found

    def _without_lines(self, prompt: str, choices: Sequence[str] = ()) -> str:
        offered = {choice.strip().casefold() for choice in choices}
        return "\n".join(
            line
            for line in prompt.split("\n")
            if line.strip() not in self._lines and not _lists_choice(line, offered)
        )


def _lines(prompt: str) -> list[str]:
    """The lines of a prompt of several; a one-line prompt has no line to spare."""
    lines = [line.strip() for line in prompt.split("\n") if line.strip()]
    return lines if len(lines) > 1 else []


def _longest(words: Sequence[str], heads: set[object]) -> int:
    """How many words of the text's beginning are one of `heads`; so are all shorter ones then."""
    count = 0
    while tuple(words[: count + 1]) in heads and count < len(words):
        count += 1
    return count


def _lists_choice(line: str, choices: set[str]) -> bool:
    words = line.casefold().split()
    return any(
        " ".join(words[skip:]) in choices for skip in range(min(CHOICE_MARK_WORDS, len(words)) + 1)
    )
