"""Parses untrusted JSON; refuses what Python's parser is too lenient about or is exhausted by."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 16  # nesting of lists and objects; a manifest has 6 levels

# An unterminated string extends to the end of the text, which keeps the scan linear; the parser
# refuses it afterwards.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")


def parse(data: bytes, depth: int = MAX_DEPTH) -> Any:
    """Parses a JSON document in UTF-8.

    Raises:
        ValueError: it is not JSON, is nested deeper than `depth`, has a duplicate key, or has an
            invalid number or string (NaN, Infinity, 1e999, a lone surrogate).
    """
    text = data.decode()
    _check_depth(text, depth)
    value = json.loads(
        text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
    )
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    return value


def _check_depth(text: str, limit: int) -> None:
    """Raises ValueError for deep nesting, before the recursive parser sees it."""
    depth = 0
    for bracket in _NO_BRACKETS.sub("", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > limit:
            raise ValueError(f"nested deeper than {limit} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate[:100]!r}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} overflows a float")
    return number
