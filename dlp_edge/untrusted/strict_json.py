"""JSON from strangers: what Python's parser lets pass, and what would exhaust it, is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 16  # of nested lists and objects; a manifest has 6

# A string ends at the end of the text where its quote is missing, so that one look at each
# character is enough; the parser refuses it afterwards.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_PLAIN = re.compile(r"[^\[\]{}]+")


def parse(data: bytes, depth: int = MAX_DEPTH) -> Any:
    """The document that UTF-8 text holds.

    Raises:
        ValueError: it is no JSON, is nested deeper than `depth`, names a field twice, or has a
            number or text that is none (NaN, Infinity, 1e999, half a surrogate pair).
    """
    text = data.decode("utf-8")
    _check_depth(text, depth)
    value = json.loads(
        text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
    )
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    return value


def _check_depth(text: str, most: int) -> None:
    """Raises ValueError before a parser that calls itself for every level is asked."""
    depth = 0
    for bracket in _PLAIN.sub("", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > most:
            raise ValueError(f"nested deeper than {most} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} is there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is beyond every float")
    return number
