"""A `tokenizer.json` from a stranger: what it may hold, and a library that may panic over it.

The tokenizers library is Rust; where it did not expect something it panics, which Python sees as
a `PanicException`, no `Exception`. So it is caught by name, while loading and in every later call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from tokenizers import Encoding, Tokenizer

from dlp_edge.errors import BundleError
from dlp_edge.untrusted.regex_check import check_pattern

MAX_PIECES = 64  # normalizers, pre-tokenizers, decoders together
MAX_GROWTH = 64  # what replacements may make of one character, one after the other
MAX_STRING = 2_000
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_BLOBS = ("precompiled_charsmap",)  # 0.3 MB of base64 in real files

_PROBE = "Hello,  world!\n\tIt's 12345 aaaaaaaaaaaaaaaa \u00e9\u4e16\U0001f600"

T = TypeVar("T")


def load_tokenizer(data: bytes, vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer without its padding and truncation.

    Args:
        vocab_size: ids that there may be; None: any number.

    Returns:
        What can be called as a Tokenizer: those of its methods that this package uses.

    Raises:
        ValueError: the bytes are no tokenizer, or not a harmless one.
    """
    try:
        tokenizer = _without_panic(lambda: Tokenizer.from_buffer(data))
        _without_panic(tokenizer.no_padding)
        _without_panic(tokenizer.no_truncation)
        # The library's own view of what it has read: a second parser might see another file.
        states = [_state(tokenizer, name) for name in _PARTS]
        size = _without_panic(tokenizer.get_vocab_size)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)[:300]) from error
    pieces = [piece for state in states for piece in _objects(state)]
    if len(pieces) > MAX_PIECES * len(_PARTS):
        raise ValueError(f"it has {len(pieces)} parts")
    growth = 1
    for piece in pieces:
        growth *= _check_piece(piece)
    if growth > MAX_GROWTH:
        raise ValueError("its replacements make too much of a text")
    if vocab_size is not None and size > vocab_size:
        raise ValueError(f"it has {size} tokens, the backbone {vocab_size}")
    try:
        _without_panic(lambda: tokenizer.decode(tokenizer.encode(_PROBE).ids))
    except Exception as error:
        raise ValueError(f"it fails on plain text: {str(error)[:200]}") from error
    return cast("Tokenizer", GuardedTokenizer(tokenizer))


class GuardedTokenizer:
    """A tokenizer whose panics are a BundleError.

    Some depend on the text: a pattern that gives up over it, a table that has no entry.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(
        self, text: str | list[str], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> Encoding:
        return self._call(
            lambda: self._tokenizer.encode(
                text, is_pretokenized=is_pretokenized, add_special_tokens=add_special_tokens
            )
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._call(
            lambda: self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        )

    def token_to_id(self, token: str) -> int | None:
        return self._call(lambda: self._tokenizer.token_to_id(token))

    def get_vocab_size(self) -> int:
        return self._call(self._tokenizer.get_vocab_size)

    def to_str(self) -> str:
        return self._call(self._tokenizer.to_str)

    @staticmethod
    def _call(call: Callable[[], T]) -> T:
        try:
            return _without_panic(call)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"the bundle's tokenizer fails on a text ({str(error)[:200]})",
                "Export the bundle again, with another tokenizer",
            ) from error


def _without_panic(call: Callable[[], T]) -> T:
    """The call's result. Raises ValueError for a panic of the library."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {error}") from error


def _state(tokenizer: Tokenizer, name: str) -> Any:
    part = getattr(tokenizer, name)
    return None if part is None else json.loads(_without_panic(part.__getstate__))


def _objects(state: Any) -> Iterator[dict[str, Any]]:
    """Every object in it. The library reads no file that is nested deeper than 128 levels."""
    if isinstance(state, dict):
        yield state
    for inner in state.values() if isinstance(state, dict) else state or ():
        if isinstance(inner, (dict, list)):
            yield from _objects(inner)


def _check_piece(piece: dict[str, Any]) -> int:
    """How many characters it can make of one.

    Raises:
        ValueError: it holds a text or a pattern that no real tokenizer has.
    """
    for name, value in piece.items():
        if isinstance(value, str) and len(value) > MAX_STRING and name not in _BLOBS:
            raise ValueError(f"its {name[:100]} has {len(value)} characters")
        if name == "Regex":
            check_pattern(value)
    kind = piece.get("type")
    return max(1, len(piece.get("content") or "")) if kind == "Replace" else 1
