r"""Refuses regular expressions that can backtrack for too long.

The tokenizers library uses Oniguruma, a backtracking engine: `(a+)+$` takes exponential time in
the length of the text, `.*.*x` cubic time. Real tokenizers need little: alternatives that are
sequences of repeated character classes. So a pattern may repeat a group only if the group matches
in one way, and an alternative may contain at most one repetition that can backtrack. That alone
would allow quadratic work: `a*b` reads a row of a's from each of its positions, 30 s for 64,000.
So a repetition that can backtrack must be followed, as in the patterns of GPT-2, Llama 3, Qwen and
GPT-4o, by an alternative that takes the whole row if it fails: `\s*[\r\n]+|\s+(?!\S)|\s+`. Then
each row is read a few times in all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

MAX_PATTERN = 2_000
MAX_CHOICES = 2_000
FEW = 16  # up to this bound a repetition is treated as if it were expanded
_MAX_DEPTH = 8

_GROUP = re.compile(r"\((?:\?(?:[imx-]*:|=|!|<=|<!|>))?")
_LOOKAROUND = ("(?=", "(?!", "(?<=", "(?<!")
# A class or character that is repeated greedily, from at most FEW.
_REPEATED = re.compile(r"([^()]+?)(?:[*+]|\{(?:\d|1[0-6])?,\})\+?\Z", re.DOTALL)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,4})?(,)?(\d{1,4})?\})[?+]?")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_ ]{1,40}\}|x[0-9a-fA-F]{2}|x\{[0-9a-fA-F]{1,6}\}"
    r"|u[0-9a-fA-F]{4}|[^0-9kgKRXxuUpPcCM])"
)


@dataclass(frozen=True)
class _Shape:
    """The backtracking behaviour of a subpattern.

    Attributes:
        unbounded: number of unbounded repetitions.
        risks: those among them that can backtrack when what follows in the subpattern fails.
        empty: whether it can match the empty string.
        choices: number of ways it can match, not counting unbounded repetitions.
        starts: the text before an alternative's first unbounded repetition, and what that
            repeats; None without one, or if it is lazy or in a group.
    """

    unbounded: int = 0
    risks: int = 0
    empty: bool = False
    choices: int = 1
    starts: tuple[str, str] | None = None


def check_pattern(pattern: str, risks: int = 0) -> int:
    """Checks that matching takes at most O(n^(risks + 1)) time for a text of length n.

    Returns:
        The number of ways in which it can match at a place, at most MAX_CHOICES.

    Raises:
        ValueError: the pattern may take longer, or uses unsupported syntax.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern has {len(pattern)} characters, the limit is {MAX_PATTERN}")
    shapes, at = _alternatives(pattern, 0, 0)
    if at != len(pattern):
        raise ValueError(f"the pattern {pattern[:100]!r} has an unmatched closing parenthesis")
    choices = _union(shapes).choices
    if choices > MAX_CHOICES or not all(
        shape.risks <= risks or (shape.risks == 1 and _is_caught(shape, shapes[index + 1 :]))
        for index, shape in enumerate(shapes)
    ):
        raise ValueError(f"the pattern {pattern[:100]!r} may take too long")
    return choices


def _is_caught(risky: _Shape, later: list[_Shape]) -> bool:
    """Whether a row of characters that an alternative reads in vain is then taken as a whole.

    The alternatives up to that one must start with the same repetition: another could take a
    single character, and the row would be read again from the next.
    """
    for shape in later:
        if risky.starts is None or shape.starts is None:
            return False
        if shape.starts[1] != risky.starts[1] or shape.starts[0] not in ("", risky.starts[0]):
            return False
        if shape.risks == 0:
            return True
    return False


def _alternatives(pattern: str, at: int, depth: int) -> tuple[list[_Shape], int]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"the pattern {pattern[:100]!r} is nested too deeply")
    shapes = []
    while True:
        shape, at = _sequence(pattern, at, depth)
        shapes.append(shape)
        if at >= len(pattern) or pattern[at] != "|":
            break
        at += 1
    return shapes, at


def _union(shapes: list[_Shape]) -> _Shape:
    return _Shape(
        max(shape.unbounded for shape in shapes),
        max(shape.risks for shape in shapes),
        any(shape.empty for shape in shapes),
        sum(shape.choices for shape in shapes),
    )


def _sequence(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    items: list[_Shape] = []
    starts, begin = None, at
    while at < len(pattern) and pattern[at] not in "|)":
        item, end = _item(pattern, at, depth)
        if item.unbounded and starts is None and not any(other.unbounded for other in items):
            repeated = _REPEATED.match(pattern[at:end])
            starts = repeated and (pattern[begin:at], repeated.group(1))
        items.append(item)
        at = end
    risks = sum(item.risks for item in items)
    if risks:
        starts = None
    for index, item in enumerate(items):
        if item.unbounded and not all(later.empty for later in items[index + 1 :]):
            risks += item.unbounded
    return _Shape(
        sum(item.unbounded for item in items),
        risks,
        all(item.empty for item in items),
        math.prod(item.choices for item in items),
        starts,
    ), at


def _item(pattern: str, at: int, depth: int) -> tuple[_Shape, int]:
    """Parses an atom and its quantifier."""
    shape, at = _atom(pattern, at, depth)
    repeated = False
    while (match := _QUANTIFIER.match(pattern, at)) and match.group() != "{}":
        if repeated:
            raise ValueError(f"the pattern {pattern[:100]!r} has consecutive quantifiers")
        repeated, at = True, match.end()
        least, most = _bounds(match)
        if most > 1 and (shape.choices > 1 or shape.unbounded or shape.empty):
            raise ValueError(f"the pattern {pattern[:100]!r} may take too long")
        empty = shape.empty or least == 0
        if most > FEW:
            shape = _Shape(1, 0, empty, 1)
        else:
            shape = _Shape(shape.unbounded, shape.risks, empty, shape.choices + most - least)
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
            raise ValueError(f"the pattern {pattern[:100]!r} has an unsupported group")
        shapes, end = _alternatives(pattern, match.end(), depth + 1)
        if pattern[end : end + 1] != ")":
            raise ValueError(f"the pattern {pattern[:100]!r} has an unclosed group")
        shape = _union(shapes)
        if match.group() in _LOOKAROUND:
            if shape.unbounded:
                raise ValueError(f"the pattern {pattern[:100]!r} looks ahead without bound")
            shape = replace(shape, empty=False)  # it can fail
        return shape, end + 1
    if character == "[":
        return _Shape(), _class_end(pattern, at)
    if character == "\\":
        return _Shape(), _escape_end(pattern, at)
    if character in "*+?":
        raise ValueError(f"the pattern {pattern[:100]!r} has nothing to repeat")
    return _Shape(), at + 1


def _class_end(pattern: str, at: int) -> int:
    """Returns the index after a character class. Classes may be nested."""
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
    raise ValueError(f"the pattern {pattern[:100]!r} has an unclosed character class")


def _escape_end(pattern: str, at: int) -> int:
    match = _ESCAPE.match(pattern, at)
    if match is None:
        raise ValueError(
            f"the pattern {pattern[:100]!r} has the unsupported escape {pattern[at : at + 2]!r}"
        )
    return match.end()
