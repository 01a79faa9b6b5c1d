"""Loads an untrusted `tokenizer.json`, and guards against panics of the tokenizers library.

The library is written in Rust. A panic reaches Python as a `PanicException`, which is not an
`Exception`, so it is caught by name, both while loading and in every later call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from tokenizers import AddedToken, Encoding, Tokenizer

from dlp_edge.errors import BundleError
from dlp_edge.native_calls import native_calls
from dlp_edge.untrusted.regex_check import check_pattern

MAX_PIECES = 64  # normalizers, pre-tokenizers, decoders together
MAX_GROWTH = 64  # characters that all replacements together may produce from one
MAX_STRING = 2_000
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_BLOBS = ("precompiled_charsmap",)  # 0.3 MB of base64 in real files

_PROBE = "Hello,  world!\n\tIt's 12345 aaaaaaaaaaaaaaaa \u00e9\u4e16\U0001f600"

T = TypeVar("T")


def load_tokenizer(data: bytes, vocab_size: int | None = None) -> Tokenizer:
    """Loads a tokenizer, without padding and truncation.

    Args:
        vocab_size: the maximum number of tokens; None for no limit.

    Returns:
        A `GuardedTokenizer`, which has the Tokenizer methods that this package uses.

    Raises:
        ValueError: the bytes are not a tokenizer, or it exceeds the limits.
    """
    try:
        tokenizer = _without_panic(lambda: Tokenizer.from_buffer(data))
        _without_panic(tokenizer.no_padding)
        _without_panic(tokenizer.no_truncation)
        # Check the library's own state: a second parser might read the file differently.
        states = [_state(tokenizer, name) for name in _PARTS]
        size = _without_panic(tokenizer.get_vocab_size)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)[:300]) from error
    pieces = [piece for state in states for piece in _objects(state)]
    if len(pieces) > MAX_PIECES * len(_PARTS):
        raise ValueError(f"{len(pieces)} components, the limit is {MAX_PIECES * len(_PARTS)}")
    growth = 1
    for piece in pieces:
        growth *= _check_piece(piece)
    if growth > MAX_GROWTH:
        raise ValueError("the replacements expand a text too much")
    if vocab_size is not None and size > vocab_size:
        raise ValueError(f"{size} tokens, the backbone has {vocab_size}")
    try:
        _without_panic(lambda: tokenizer.decode(tokenizer.encode(_PROBE).ids))
    except Exception as error:
        raise ValueError(f"fails on plain text: {str(error)[:200]}") from error
    return cast("Tokenizer", GuardedTokenizer(tokenizer))


class GuardedTokenizer:
    """A tokenizer that raises BundleError where the library would panic.

    Some panics depend on the text, such as a pattern that gives up or a missing table entry.
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

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._call(self._tokenizer.get_added_tokens_decoder)

    def get_vocab_size(self) -> int:
        return self._call(self._tokenizer.get_vocab_size)

    def to_str(self) -> str:
        return self._call(self._tokenizer.to_str)

    @staticmethod
    def _call(call: Callable[[], T]) -> T:
        try:
            with native_calls:
                return _without_panic(call)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"the bundle's tokenizer failed on a text ({str(error)[:200]})",
                "Export the bundle again, with another tokenizer",
            ) from error


def _without_panic(call: Callable[[], T]) -> T:
    """Returns the call's result. Raises ValueError if the library panics."""
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
    """Yields every object in `state`. Recursion is safe: the library limits nesting to 128."""
    if isinstance(state, dict):
        yield state
    for inner in state.values() if isinstance(state, dict) else state or ():
        if isinstance(inner, (dict, list)):
            yield from _objects(inner)


def _check_piece(piece: dict[str, Any]) -> int:
    """Returns how many characters a component can produce from one.

    Raises:
        ValueError: a string is too long, or a pattern is unsafe.
    """
    for name, value in piece.items():
        if isinstance(value, str) and len(value) > MAX_STRING and name not in _BLOBS:
            raise ValueError(f"{name[:100]} has {len(value)} characters, the limit is {MAX_STRING}")
        if name == "Regex":
            check_pattern(value)
    kind = piece.get("type")
    return max(1, len(piece.get("content") or "")) if kind == "Replace" else 1
