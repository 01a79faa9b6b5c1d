"""The methods of text in chat templates, each with its cost charged first.

Python searches backwards in time proportional to the product of the lengths, and `split` makes a
list of any length before it can be counted. So those searches run forwards in reversed text, and
lists have a limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from dlp_edge.untrusted.template_budget import (
    MAX_ITEMS,
    HostileTemplateError,
    budget,
    limited,
    weight,
)

MAX_STRIPPED = 1_000  # different characters to strip; each is looked up in all of them
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def _find(text: str, part: str, *bounds: int) -> int:
    return text.find(part, *bounds)


def _index(text: str, part: str, *bounds: int) -> int:
    return text.index(part, *bounds)


def _count(text: str, part: str, *bounds: int) -> int:
    return text.count(part, *bounds)


def _starts(text: str, part: str | tuple[str, ...], *bounds: int) -> bool:
    return text.startswith(part, *bounds)


def _ends(text: str, part: str | tuple[str, ...], *bounds: int) -> bool:
    return text.endswith(part, *bounds)


def _rfind(text: str, part: str, start: int | None = None, end: int | None = None) -> int:
    begin, stop, _ = slice(start, end).indices(len(text))
    at = text[begin:stop][::-1].find(part[::-1])
    return -1 if at < 0 or begin > stop else stop - at - len(part)


def _rindex(text: str, part: str, start: int | None = None, end: int | None = None) -> int:
    at = _rfind(text, part, start, end)
    if at < 0:
        raise ValueError("substring not found")
    return at


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    parts = text.split(sep, MAX_ITEMS if maxsplit < 0 else min(maxsplit, MAX_ITEMS))
    limited(len(parts))
    return parts


def _rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    parts = _split(text[::-1], sep if sep is None else sep[::-1], maxsplit)
    return [part[::-1] for part in reversed(parts)]


def _rpartition(text: str, sep: str) -> tuple[str, str, str]:
    if not sep:
        raise ValueError("empty separator")
    at = _rfind(text, sep)
    return ("", "", text) if at < 0 else (text[:at], sep, text[at + len(sep) :])


def _splitlines(text: str, keepends: bool = False) -> list[str]:
    limited(sum(text.count(character) for character in _LINE_BREAKS))
    return text.splitlines(keepends)


def stripped(name: str) -> Callable[..., str]:
    """strip, lstrip or rstrip."""

    def strip(text: str, chars: str | None = None) -> str:
        if chars is not None:
            chars = "".join(set(chars))
            if len(chars) > MAX_STRIPPED:
                raise HostileTemplateError("the chat template strips too many characters")
            budget.get().read(text, times=1 + len(chars) // 8)
        found: str = getattr(str, name)(text, chars)
        return found

    return strip


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """str.replace."""
    found = text.count(old) if old else len(text) + 1
    budget.get().produce(sys.getsizeof(text) + found * sys.getsizeof(new))
    return text.replace(old, new, count)


def joined(between: str, values: Iterable[Any]) -> str:
    """str.join of texts."""
    texts = list(values)
    items, characters = weight(texts)
    wide = all(isinstance(text, str) and text.isascii() for text in (between, *texts))
    budget.get().produce((characters + items * len(between)) * (1 if wide else 4))
    return between.join(texts)


_READING = {
    "count": _count, "endswith": _ends, "find": _find, "index": _index, "rfind": _rfind,
    "rindex": _rindex, "startswith": _starts,
    **{name: getattr(str, name) for name in
       "isalnum isalpha isdigit islower isnumeric isspace istitle isupper".split()},
}  # fmt: skip
_MAKING: dict[str, Callable[..., Any]] = {
    "partition": str.partition, "removeprefix": str.removeprefix,
    "removesuffix": str.removesuffix, "rpartition": _rpartition, "rsplit": _rsplit,
    "split": _split, "splitlines": _splitlines,
    **{name: stripped(name) for name in ("lstrip", "rstrip", "strip")},
    **{name: getattr(str, name) for name in "capitalize lower swapcase title upper".split()},
}  # fmt: skip
_CHANGE_CASE = 3  # characters that a change of case may make of one
METHODS = frozenset(_READING) | frozenset(_MAKING) | {"replace", "join"}


def call_method(text: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of a text within the budget."""
    if name == "join":
        return budget.get().result(joined(text, *args, **kwargs))
    if name == "replace":
        return budget.get().result(replaced(text, *args, **kwargs))
    budget.get().read(text, *args)
    if name in _READING:
        return _READING[name](text, *args, **kwargs)
    budget.get().produce(sys.getsizeof(text) * (1 if text.isascii() else _CHANGE_CASE))
    return budget.get().result(_MAKING[name](text, *args, **kwargs))
