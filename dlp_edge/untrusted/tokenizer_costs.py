"""Bounds what a tokenizer may cost: growth of a text, ids added to it, patterns, long tokens.

A tokenizer that is well formed can turn one character into thousands, by components that each
look harmless. So every component has a factor, the most characters that it makes of one, and the
factors of a chain are multiplied. Real chains have factors of up to 2,600, which no real text
comes near; what a text grows to is therefore measured before it is encoded (`GrowthLimit`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from dlp_edge.untrusted.regex_check import MAX_CHOICES, check_pattern

MAX_PIECES = 64  # normalizers, pre-tokenizers, decoders together
MAX_STRING = 2_000
MAX_TOKEN = 2_000  # characters of a token; the longest real ones have some hundred
MAX_UNIGRAM = 256
MAX_PREFIX = 16  # of the pieces inside a word ("##")
MAX_WORD = 200  # characters that WordPiece looks at; it takes the square of them. Real ones: 100
MAX_ADDED_IDS = 64  # of one special token
MAX_GROWTH = 4_000  # of encoding
MAX_INSERTED = 64  # by all replacements of a character, those of the decoder included
_BLOBS = ("precompiled_charsmap",)  # 0.3 MB of base64 in real files

# The most characters that a component makes of one: U+FDFA has 18 in NFKC, U+1F82 four in NFD,
# U+1D160 three in NFC, a character four bytes. Spaces are put around Chinese characters.
_FACTORS = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 4,
    "ByteLevel": 4, "Metaspace": 2,
}  # fmt: skip

_CHUNK = 256  # characters that are normalized at a time when growth is measured
_FREE = 64 << 10  # characters that any text may grow to
_USUAL = 8  # growth that any text may have: bytes of a character, and twice that


class GrowthLimit:
    """Measures what a text grows to, where the tokenizer could make much more of it.

    Args:
        factor: the most characters that all components together make of one.
        rest: that of the components after the normalizer.
        normalize: applies the normalizer.
    """

    def __init__(self, factor: int, rest: int, normalize: Callable[[str], str]) -> None:
        self._factor = factor
        self._rest = rest
        self._normalize = normalize

    def check(self, text: str) -> None:
        """Raises ValueError for a text that would grow too much."""
        most = _FREE + _USUAL * len(text)
        if len(text) * self._factor <= most:
            return
        size = 0
        for start in range(0, len(text), _CHUNK):
            size += len(self._normalize(text[start : start + _CHUNK])) * self._rest
            if size > most:
                raise ValueError("the tokenizer expands this text too much")


def check_components(states: Mapping[str, Any], normalize: Callable[[str], str]) -> GrowthLimit:
    """Checks the components of a tokenizer.

    Args:
        states: part ("normalizer", "pre_tokenizer", "post_processor", "decoder") -> its state.
        normalize: applies the normalizer.

    Raises:
        ValueError: a component is unsafe, or they expand a text too much.
    """
    growth = dict.fromkeys(states, 1)
    count, inserted, choices = 0, 1, 0
    for part, state in states.items():
        for piece in _objects(state):
            count += 1
            growth[part] *= _check_piece(piece)
            if "Regex" in piece:
                choices += check_pattern(piece["Regex"])
            if piece.get("type") == "Replace":
                inserted *= max(1, len(piece.get("content") or ""))
    if count > MAX_PIECES * len(states):
        raise ValueError(f"{count} components, the limit is {MAX_PIECES * len(states)}")
    if choices > 2 * MAX_CHOICES:
        raise ValueError("the patterns together may take too long")
    encoding = growth["normalizer"] * growth["pre_tokenizer"]
    if encoding > MAX_GROWTH or inserted > MAX_INSERTED:
        raise ValueError("the replacements expand a text too much")
    return GrowthLimit(encoding, growth["pre_tokenizer"], normalize)


def check_model(tokenizer: Tokenizer, data: bytes) -> None:
    """Checks a model's options and the lengths of its tokens.

    Args:
        data: the file that it was read from.

    Raises:
        ValueError: one of them is too long.
    """
    model: Any = tokenizer.model
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(model, name, None) or "") > MAX_PREFIX:
            raise ValueError(f"{name} is longer than {MAX_PREFIX} characters")
    if getattr(model, "max_input_chars_per_word", 0) > MAX_WORD:
        raise ValueError(f"max_input_chars_per_word is over {MAX_WORD}")
    limit = MAX_UNIGRAM if isinstance(model, Unigram) else MAX_TOKEN
    if _longest_run(data) <= limit:  # a list of all tokens takes longer
        return
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > limit:
        raise ValueError(f"a token has {longest} characters, the limit is {limit}")


def _longest_run(data: bytes) -> int:
    """Returns the most bytes between two quotation marks that no backslash precedes: no text in
    this JSON has more characters."""
    numbers = np.frombuffer(data, np.uint8)
    is_quote = numbers == ord('"')
    is_quote[1:] &= numbers[:-1] != ord("\\")
    quotes = np.flatnonzero(is_quote)
    return int(np.diff(quotes, prepend=-1, append=len(data)).max()) if len(quotes) else len(data)


def _objects(state: Any) -> Iterator[dict[str, Any]]:
    """Yields every object in `state`. Recursion is safe: the library limits nesting to 128."""
    if isinstance(state, dict):
        yield state
    for inner in state.values() if isinstance(state, dict) else state or ():
        if isinstance(inner, (dict, list)):
            yield from _objects(inner)


def _check_piece(piece: dict[str, Any]) -> int:
    """Returns how many characters a component can make of one.

    Raises:
        ValueError: a string or list of ids is too long, or the text is repeated.
    """
    for name, value in piece.items():
        if isinstance(value, str) and len(value) > MAX_STRING and name not in _BLOBS:
            raise ValueError(f"{name[:100]} has {len(value)} characters, the limit is {MAX_STRING}")
        if name in ("ids", "tokens") and len(value) > MAX_ADDED_IDS:
            raise ValueError(f"a special token has {len(value)} ids, the limit is {MAX_ADDED_IDS}")
    kind = piece.get("type")
    if kind == "Replace":
        return _replacement(piece)
    if kind == "TemplateProcessing" and sum("Sequence" in item for item in piece["single"]) != 1:
        raise ValueError("the post-processor repeats the text")
    if kind == "Prepend":  # to every stretch between two added tokens
        return 1 + len(piece.get("prepend") or "")
    if kind == "Precompiled":
        return _charsmap(piece.get("precompiled_charsmap"))
    return _FACTORS.get(str(kind), 1)


def _replacement(piece: Mapping[str, Any]) -> int:
    pattern, size = piece.get("pattern") or {}, len(piece.get("content") or "")
    old = pattern.get("String")
    if old:
        return max(1, -(-size // len(old)))
    return 1 + size  # also where nothing is replaced, for a pattern that matches the empty text


def _charsmap(encoded: Any) -> int:
    """Returns the length of the longest replacement of a SentencePiece normalizer: the size of a
    trie, the trie, and the replacements, each with a zero byte after it."""
    data = base64.b64decode(encoded) if isinstance(encoded, str) else bytes(encoded or ())
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1, *(len(text) for text in texts.split(b"\0")))
