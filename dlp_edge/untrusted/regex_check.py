"""Which regular expressions a tokenizer from a stranger may bring.

Oniguruma, which the tokenizers library uses, backtracks: `(a+)+$` takes time exponential in the
text, `.*.*x` its cube. Real tokenizers need little: alternatives of character classes, each
repeated, one after the other. So a pattern may repeat a group only when there is one way to do it,
and an alternative may hold at most one repetition that what follows can make shorter again. The
work is then at most quadratic in the length of the text, as it is with the patterns of GPT-2,
Llama 3, Qwen and GPT-4o.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_PATTERN = 2_000
MAX_CHOICES = 2_000
FEW = 16  # repeated at most so often, something counts as written out
_MAX_DEPTH = 8

_GROUP = re.compile(r"\((?:\?(?:[imx-]*:|=|!|<=|<!|>))?")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,4})?(,)?(\d{1,4})?\})[?+]?")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_ ]{1,40}\}|x[0-9a-fA-F]{2}|x\{[0-9a-fA-F]{1,6}\}"
    r"|u[0-9a-fA-F]{4}|[^0-9kgKRXxuUpPcCM])"
)


@dataclass(frozen=True)
class _Shape:
    """What matters of a piece.

    Attributes:
        endless: its repetitions without end.
        risks: those of them that can be made shorter again for what follows inside it.
        empty: whether it can match nothing.
        choices: the ways in which it can match, those repetitions left out.
    """

    endless: int = 0
    risks: int = 0
    empty: bool = False
    choices: int = 1


def check_pattern(pattern: str, risks: int = 1) -> None:
    """Raises ValueError for a pattern that may take long (longer than the length of the text to the
    power of `risks` + 1), or that is not understood here."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters")
    shape, at = _alternatives(pattern, 0, 0)
    if at != len(pattern):
        raise ValueError(f"the pattern {pattern[:100]!r} has a bracket too many")
    if shape.risks > risks or shape.choices > MAX_CHOICES:
        raise ValueError(f"the pattern {pattern[:100]!r} may take too long")


def _alternatives(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"the pattern {pattern[:100]!r} is nested too deeply")
    found = []
    while True:
        shape, at = _sequence(pattern, at, depth)
        found.append(shape)
        if at >= len(pattern) or pattern[at] != "|":
            break
        at += 1
    return _Shape(
        max(shape.endless for shape in found),
        max(shape.risks for shape in found),
        any(shape.empty for shape in found),
        sum(shape.choices for shape in found),
    ), at


def _sequence(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    items = []
    while at < len(pattern) and pattern[at] not in "|)":
        item, at = _item(pattern, at, depth)
        items.append(item)
    risks = sum(item.risks for item in items)
    for index, item in enumerate(items):
        if item.endless and not all(later.empty for later in items[index + 1 :]):
            risks += item.endless
    return _Shape(
        sum(item.endless for item in items),
        risks,
        all(item.empty for item in items),
        math.prod(item.choices for item in items),
    ), at


def _item(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    """An atom and its quantifiers."""
    shape, at = _atom(pattern, at, depth)
    repeated = False
    while (match := _QUANTIFIER.match(pattern, at)) and match.group() != "{}":
        if repeated:
            raise ValueError(f"the pattern {pattern[:100]!r} repeats a repetition")
        repeated, at = True, match.end()
        least, most = _bounds(match)
        if most > 1 and (shape.choices > 1 or shape.endless or shape.empty):
            raise ValueError(f"the pattern {pattern[:100]!r} may take too long")
        empty = shape.empty or least == 0
        if most > FEW:
            shape = _Shape(1, 0, empty, 1)
        else:
            shape = _Shape(shape.endless, shape.risks, empty, shape.choices + most - least)
    return shape, at


def _bounds(match: re.Match[str]) -> tuple[int, int]:
    first = match.group()[0]
    if first != "{":
        return {"*": (0, 1 << 20), "+": (1, 1 << 20), "?": (0, 1)}[first]
    least = int(match.group(1) or 0)
    if not match.group(2):
        return least, least
    return least, int(match.group(3) or 1 << 20)


def _atom(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    character = pattern[at]
    if character == "(":
        match = _GROUP.match(pattern, at)
        if match is None or pattern[match.end() : match.end() + 1] == "?":
            raise ValueError(f"the pattern {pattern[:100]!r} has a group that is not known")
        shape, end = _alternatives(pattern, match.end(), depth + 1)
        if pattern[end : end + 1] != ")":
            raise ValueError(f"the pattern {pattern[:100]!r} has a bracket too few")
        return shape, end + 1
    if character == "[":
        return _Shape(), _class_end(pattern, at)
    if character == "\\":
        return _Shape(), _escape_end(pattern, at)
    if character in "*+?":
        raise ValueError(f"the pattern {pattern[:100]!r} repeats nothing")
    return _Shape(), at + 1


def _class_end(pattern: str, at: int) -> int:
    """Where a character class ends; classes may hold classes."""
    depth = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at = _escape_end(pattern, at)
            continue
        depth += {"[": 1, "]": -1}.get(character, 0)
        at += 1
        if depth == 0:
            return at
    raise ValueError(f"the pattern {pattern[:100]!r} has a class without an end")


def _escape_end(pattern: str, at: int) -> int:
    match = _ESCAPE.match(pattern, at)
    if match is None:
        raise ValueError(f"the pattern {pattern[:100]!r} has {pattern[at : at + 2]!r} in it")
    return match.end()
