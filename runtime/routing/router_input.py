"""The router's input: token ids of the prompt and of the answer so far, in segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.errors import RouterError
from dlp_edge.runtime.routing.word_cache import CACHE_CHARACTERS, CachingEncoder

MAX_ROUTER_INPUT = 256  # tokens, separators included
# The prompt has several segments, so that the router can tell its first request from its last. The
# answer's segments: the earlier lines, the start of the current line, the rest of it, the tokens
# just before the new sentence, and the sentence's first tokens.
PROMPT_SEGMENTS = 8
ANSWER_SEGMENTS = 5
SEGMENTS = PROMPT_SEGMENTS + ANSWER_SEGMENTS
MIN_SEGMENT_TOKENS = 8  # of a prompt's segment; short prompts fill fewer segments
LINE_START_TOKENS = 6
RECENT_TOKENS = 8
OPENING_TOKENS = 2
_FIXED_TOKENS = LINE_START_TOKENS + RECENT_TOKENS + OPENING_TOKENS
# Limits how much text is tokenized at all; English has 4 to 5 characters a token.
CHARACTERS_PER_TOKEN = 5


def check_settings(settings: RouterSettings) -> None:
    """Raise RouterError unless a router can work with these settings."""
    if len(set(settings.labels)) != len(settings.labels):
        raise RouterError(
            f"the router's labels {settings.labels!r} repeat", "Name every adapter once"
        )
    fixed = PROMPT_SEGMENTS - 1 if settings.spread else 0  # one token per segment
    smallest = min(settings.prompt_tokens - fixed, settings.generated_tokens - _FIXED_TOKENS)
    longest = settings.prompt_tokens + settings.generated_tokens + SEGMENTS - 1
    if smallest < 1 or longest > MAX_ROUTER_INPUT:
        raise RouterError(
            f"the router reads {settings.prompt_tokens} + {settings.generated_tokens} tokens",
            f"Choose at least {fixed + 1} and {_FIXED_TOKENS + 1}; with {SEGMENTS - 1} separators "
            f"at most {MAX_ROUTER_INPUT}",
        )
    if not 0 < settings.temperature < float("inf"):
        raise RouterError(
            f"the router's temperature is {settings.temperature}", "Choose a positive number"
        )


class RouterInputEncoder:
    """Encodes text as the router's input, in training and at run time.

    Args:
        capacity: of the word cache, in characters.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: RouterSettings, capacity: int = CACHE_CHARACTERS
    ) -> None:
        self._token_ids = CachingEncoder(tokenizer, capacity).encode
        self._separator = tokenizer.get_vocab_size()
        self._generated_tokens = settings.generated_tokens
        self._prompt_tokens = settings.prompt_tokens
        self._spread = settings.spread
        # All sentences of an answer share the prompt, which is most of the text.
        self._prompt_segments = lru_cache(maxsize=1)(self._encode_prompt)

    def encode(self, prompt: str, generated: str) -> list[int]:
        """SEGMENTS segments of ids, joined by the separator: the first id beyond the vocabulary.

        The network pools each segment separately.

        Args:
            generated: the answer so far, up to and including the new sentence's first token.
        """
        return [*self._prompt_segments(prompt), *self._answer_segments(generated)]

    def encode_prompt_ids(self, ids: list[int]) -> list[int]:
        """The input for a prompt's ids and an empty answer."""
        return [*self._split_prompt(ids), *self._answer_segments("")]

    def encode_prefixes(self, prompt: str, counts: Sequence[int]) -> Iterator[list[int]]:
        """Inputs for the prompt's first tokens alone, one for each count."""
        ids = self._token_ids(prompt[: max(counts) * CHARACTERS_PER_TOKEN])
        return (self.encode_prompt_ids(ids[:count]) for count in counts)

    def _encode_prompt(self, text: str) -> list[int]:
        """The prompt's segments, joined."""
        reach = self._prompt_tokens * CHARACTERS_PER_TOKEN
        if len(text) <= reach:
            return self._split_prompt(self._token_ids(text))
        if self._spread:
            limit = self._prompt_tokens // PROMPT_SEGMENTS
            pieces = _spread_pieces(text, reach)
            return self._joined([self._token_ids(piece)[:limit] for piece in pieces])
        return self._split_prompt(self._token_ids(text[: reach // 2] + text[-(reach // 2) :]))

    def _split_prompt(self, ids: list[int]) -> list[int]:
        """Split ids into PROMPT_SEGMENTS equal segments.

        A prompt over the limit keeps its beginning and end; with `spread`, the beginning of every
        segment.
        """
        limit, count = self._prompt_tokens, len(ids)
        if count > limit and self._spread:
            starts = [index * count // PROMPT_SEGMENTS for index in range(PROMPT_SEGMENTS)]
            return self._joined([ids[at : at + limit // PROMPT_SEGMENTS] for at in starts])
        if count > limit:
            ids = ids[: limit - limit // 2] + ids[count - limit // 2 :]
        size = max(MIN_SEGMENT_TOKENS, -(-len(ids) // PROMPT_SEGMENTS))
        starts = [index * size for index in range(PROMPT_SEGMENTS)]
        return self._joined([ids[at : at + size] for at in starts])

    def _joined(self, segments: list[list[int]]) -> list[int]:
        """Join segments with the separator."""
        ids = segments[0].copy()
        for segment in segments[1:]:
            ids += [self._separator, *segment]
        return ids

    def _answer_segments(self, text: str) -> list[int]:
        """The answer's segments, each after a separator."""
        if not text:
            return [self._separator] * ANSWER_SEGMENTS
        reach = self._generated_tokens * CHARACTERS_PER_TOKEN
        start = text.rstrip().rfind("\n") + 1
        line = self._token_ids(_ends(text[start:], reach // 3, reach - reach // 3))
        return self._split_answer(line, self._token_ids(text[max(0, start - reach) : start]))

    def _split_answer(self, line: list[int], earlier: list[int]) -> list[int]:
        room = self._generated_tokens - _FIXED_TOKENS
        opening, body = line[-OPENING_TOKENS:], line[:-OPENING_TOKENS]
        start, body = body[:LINE_START_TOKENS], body[LINE_START_TOKENS:]
        recent, running = body[-RECENT_TOKENS:], body[:-RECENT_TOKENS][-room:]
        kept = earlier[max(0, len(earlier) - (room - len(running))) :]
        ids: list[int] = []
        for segment in (kept, start, running, recent, opening):
            ids += [self._separator, *segment]
        return ids


def _ends(text: str, head: int, tail: int) -> str:
    """The text; only its first `head` and last `tail` characters if it is longer."""
    return text if len(text) <= head + tail else text[:head] + text[-tail:]


def _spread_pieces(text: str, reach: int) -> list[str]:
    """Cut PROMPT_SEGMENTS pieces from a text longer than `reach` characters.

    Two from its beginning, one from its end, the others spread evenly in between and starting with
    a line where possible. Each is a little longer than its token limit needs.
    """
    size = reach // PROMPT_SEGMENTS
    inner = PROMPT_SEGMENTS - 3
    starts = [0, size]
    for index in range(inner):
        low, high = (2 * size + at * (len(text) - 3 * size) // inner for at in (index, index + 1))
        line = text.find("\n", low, high)
        starts.append((low + high - size) // 2 if line < 0 else line + 1)
    starts.append(len(text) - size)
    return [_whole_words(text, start, start + size + size // 4) for start in starts]


def _whole_words(text: str, start: int, stop: int) -> str:
    """text[start:stop] without the words cut at its ends, if enough words remain."""
    words = text[start:stop].split()
    if len(words) < 4:
        return text[start:stop]
    first, last = (_within_word(text, at) for at in (start, stop))
    return " ".join(words[first : len(words) - last])


def _within_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and not text[at - 1].isspace() and not text[at].isspace()
