"""Loads an untrusted `tokenizer.json`, and guards against panics of the tokenizers library.

The library is written in Rust. A panic reaches Python as a `PanicException`, which is not an
`Exception`, so it is caught by name, both while loading and in every later call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from tokenizers import AddedToken, Encoding, Tokenizer

from dlp_edge.errors import BundleError
from dlp_edge.native_calls import native_calls
from dlp_edge.untrusted.tokenizer_costs import GrowthLimit, check_components, check_model

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")

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
        states = {name: _state(tokenizer, name) for name in _PARTS}
        size = _without_panic(tokenizer.get_vocab_size)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)[:300]) from error
    growth = check_components(states, lambda text: _normalized(tokenizer, text))
    check_model(tokenizer, data)
    if vocab_size is not None and size > vocab_size:
        raise ValueError(f"{size} tokens, the backbone has {vocab_size}")
    try:
        _without_panic(lambda: _probe(tokenizer, growth))
    except Exception as error:
        raise ValueError(f"fails on plain text: {str(error)[:200]}") from error
    return cast("Tokenizer", GuardedTokenizer(tokenizer, growth))


class GuardedTokenizer:
    """A tokenizer that raises BundleError where the library would panic, or run out of memory.

    Some panics depend on the text, such as a pattern that gives up or a missing table entry.
    """

    def __init__(self, tokenizer: Tokenizer, growth: GrowthLimit) -> None:
        self._tokenizer = tokenizer
        self._growth = growth

    def encode(
        self, text: str | list[str], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> Encoding:
        def encode() -> Encoding:
            for part in [text] if isinstance(text, str) else text:
                self._growth.check(part)
            return self._tokenizer.encode(
                text, is_pretokenized=is_pretokenized, add_special_tokens=add_special_tokens
            )

        return self._call(encode)

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


def _probe(tokenizer: Tokenizer, growth: GrowthLimit) -> None:
    growth.check(_PROBE)
    tokenizer.decode(tokenizer.encode(_PROBE).ids)


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


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return text
    normalized: str = _without_panic(lambda: normalizer.normalize_str(text))
    return normalized
