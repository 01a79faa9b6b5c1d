"""What the router reads: a window of ids in segments, made of the prompt and the answer so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.errors import RouterError
from dlp_edge.runtime.routing.word_cache import CACHE_CHARACTERS, CachingEncoder

MAX_ROUTER_INPUT = 256  # ids that the router reads at most
# Of the window. The prompt is read in parts, so that what was asked first can be told from
# what was asked last. Of the answer: the earlier lines, the beginning of the running line, the
# rest of it, the tokens just before the new sentence, and its first tokens.
PROMPT_SEGMENTS = 8
ANSWER_SEGMENTS = 5
SEGMENTS = PROMPT_SEGMENTS + ANSWER_SEGMENTS
LEAST_PART = 8  # tokens of a part of the prompt; short prompts have fewer parts
LINE_START_TOKENS = 6
RECENT_TOKENS = 8
OPENING_TOKENS = 2
_FIXED_TOKENS = LINE_START_TOKENS + RECENT_TOKENS + OPENING_TOKENS
# Text beyond this many characters a token is not even tokenized; English has 4 to 5.
CHARACTERS_PER_TOKEN = 5


def check_settings(settings: RouterSettings) -> None:
    """Raises RouterError unless a router can work by these settings."""
    if len(set(settings.labels)) != len(settings.labels):
        raise RouterError(f"the router's labels are {settings.labels!r}", "Name every adapter once")
    fixed = PROMPT_SEGMENTS - 1 if settings.spread else 0  # a token at least in every part
    least = min(settings.prompt_tokens - fixed, settings.generated_tokens - _FIXED_TOKENS)
    window = settings.prompt_tokens + settings.generated_tokens + SEGMENTS - 1
    if least < 1 or window > MAX_ROUTER_INPUT:
        raise RouterError(
            f"the router reads {settings.prompt_tokens} + {settings.generated_tokens} tokens",
            f"Let it read {fixed + 1} and {_FIXED_TOKENS + 1} or more, "
            f"with {SEGMENTS - 1} separators {MAX_ROUTER_INPUT} at most",
        )
    if not 0 < settings.temperature < float("inf"):
        raise RouterError(
            f"the router's temperature is {settings.temperature}", "Choose a positive number"
        )


class RouterInputEncoder:
    """Turns text into the windows of ids that routers read, in training and at run time.

    Args:
        capacity: characters of the words whose ids are remembered.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: RouterSettings, capacity: int = CACHE_CHARACTERS
    ) -> None:
        self._encode = CachingEncoder(tokenizer, capacity).encode
        self._separator = tokenizer.get_vocab_size()
        self._generated_tokens = settings.generated_tokens
        self._prompt_tokens = settings.prompt_tokens
        self._spread = settings.spread
        # All sentences of an answer share the prompt, which is most of the text to tokenize.
        self._prompt_ids = lru_cache(maxsize=1)(self._prompt)

    def encode(self, prompt: str, generated: str) -> list[int]:
        """Thirteen segments of ids with the separator between them (see SEGMENTS).

        The network pools each apart, so it can tell what was asked first and last, what is done
        and what is being begun. The separator is the first id beyond the tokenizer's.
        """
        return [*self._prompt_ids(prompt), *self._answer(generated)]

    def encode_prompt_ids(self, ids: list[int]) -> list[int]:
        """The window of a prompt's ids, before anything is answered."""
        return [*self._in_parts(ids), *self._answer("")]

    def encode_prefixes(self, prompt: str, counts: Sequence[int]) -> Iterator[list[int]]:
        """Windows of a prompt's first tokens alone, so many each time."""
        ids = self._encode(prompt[: max(counts) * CHARACTERS_PER_TOKEN])
        return (self.encode_prompt_ids(ids[:count]) for count in counts)

    def _prompt(self, text: str) -> list[int]:
        """The prompt's segments."""
        reach = self._prompt_tokens * CHARACTERS_PER_TOKEN
        if len(text) <= reach:
            return self._in_parts(self._encode(text))
        if self._spread:
            most = self._prompt_tokens // PROMPT_SEGMENTS
            return self._joined([self._encode(piece)[:most] for piece in _pieces(text, reach)])
        return self._in_parts(self._encode(text[: reach // 2] + text[-(reach // 2) :]))

    def _in_parts(self, ids: list[int]) -> list[int]:
        """All ids in PROMPT_SEGMENTS equal parts. Of too many, those of the beginning and of the
        end; or, where the prompt is read all over, the beginning of every part."""
        limit, count = self._prompt_tokens, len(ids)
        if count > limit and self._spread:
            starts = [index * count // PROMPT_SEGMENTS for index in range(PROMPT_SEGMENTS)]
            return self._joined([ids[at : at + limit // PROMPT_SEGMENTS] for at in starts])
        if count > limit:
            ids = ids[: limit - limit // 2] + ids[count - limit // 2 :]
        size = max(LEAST_PART, -(-len(ids) // PROMPT_SEGMENTS))
        starts = [index * size for index in range(PROMPT_SEGMENTS)]
        return self._joined([ids[at : at + size] for at in starts])

    def _joined(self, parts: list[list[int]]) -> list[int]:
        """The parts with the separator between them."""
        ids = parts[0].copy()
        for part in parts[1:]:
            ids += [self._separator, *part]
        return ids

    def _answer(self, text: str) -> list[int]:
        """The answer's segments, with the separator before each."""
        if not text:
            return [self._separator] * ANSWER_SEGMENTS
        reach = self._generated_tokens * CHARACTERS_PER_TOKEN
        start = text.rstrip().rfind("\n") + 1
        line = self._encode(_ends(text[start:], reach // 3, reach - reach // 3))
        return self._split_answer(line, self._encode(text[max(0, start - reach) : start]))

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
    """The text; of a long one, its first `head` and its last `tail` characters."""
    return text if len(text) <= head + tail else text[:head] + text[-tail:]


def _pieces(text: str, reach: int) -> list[str]:
    """PROMPT_SEGMENTS pieces of a text longer than `reach`: two of its beginning, one of its end,
    the others evenly from between, where a line begins if one does. They are a little longer than
    their tokens may be."""
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
    """A piece of a text without the words that it cuts, if it has others."""
    words = text[start:stop].split()
    if len(words) < 4:
        return text[start:stop]
    first, last = (_within_word(text, at) for at in (start, stop))
    return " ".join(words[first : len(words) - last])


def _within_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and not text[at - 1].isspace() and not text[at].isspace()
