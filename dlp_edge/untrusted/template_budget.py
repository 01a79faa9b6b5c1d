"""The budget of one rendering of a chat template: steps, bytes of text, characters read, seconds.

Costs are charged before an operation, at what it may cost: the values of a list are counted with
all the characters that they refer to, since a list of a thousand references to a text of 1 MB
takes no room until it is written.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from jinja2 import TemplateError
from jinja2.runtime import Macro
from jinja2.utils import Namespace

MAX_SECONDS = 2.0
MAX_STEPS = 2_000_000
MAX_BYTES = 32 << 20  # of text produced
MAX_READ = 256 << 20  # characters compared or searched; 0.3 s
MAX_ITEMS = 100_000  # of a list or dict, including nested items


class HostileTemplateError(TemplateError):
    """The template itself, not the messages, exceeds its budget."""


class Budget:
    """What is left of a rendering's steps, bytes, characters to read and time."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._bytes = MAX_BYTES
        self._read = MAX_READ
        self._end = perf_counter() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Counts steps. Raises HostileTemplateError when steps or time run out."""
        self._steps -= count
        if self._steps < 0 or perf_counter() > self._end:
            raise HostileTemplateError("the chat template runs too long")

    def produce(self, size: int) -> None:
        """Counts bytes of text that an operation produces."""
        self.step()
        self._bytes -= size
        if self._bytes < 0:
            raise HostileTemplateError("the chat template produces too much text")

    def read(self, *values: Any, times: int = 1) -> None:
        """Counts the characters of values that an operation compares or searches."""
        self.step()
        for value in values:
            self._read -= weight(value)[1] * times
        if self._read < 0:
            raise HostileTemplateError("the chat template runs too long")

    def result(self, value: Any) -> Any:
        """Counts the result of an operation and returns it."""
        if isinstance(value, str):
            self.produce(sys.getsizeof(value))
        elif isinstance(value, (list, tuple, dict)):
            self.step(weight(value)[0])
        else:
            self.step()
        return value

    def written(self, value: Any, growth: int = 1) -> None:
        """Counts what a value takes as text, if each character takes `growth` there."""
        if isinstance(value, str):
            self.produce(sys.getsizeof(value) * growth)
            return
        items, characters = weight(value)
        self.step(items)
        self.produce(characters * growth * _ESCAPED)


budget: ContextVar[Budget] = ContextVar("budget")

_OTHER = 100  # characters of a number's or function's text, at most
_ESCAPED = 4  # bytes of a character in the text of a list
_VIEWS = (KeysView, ValuesView, ItemsView)


def weight(value: Any) -> tuple[int, int]:
    """Returns the values in a value at all depths, and their characters as text.

    Raises:
        HostileTemplateError: there are more than MAX_ITEMS.
    """
    if isinstance(value, str):
        return 1, len(value)
    count, characters, pending = 0, 0, [value]
    while pending:
        inner = pending.pop()
        count += 1
        if isinstance(inner, str):
            characters += len(inner)
        elif isinstance(inner, Mapping):
            pending += inner.keys()
            pending += inner.values()
        elif isinstance(inner, (list, tuple, *_VIEWS)):
            pending += inner
        elif isinstance(inner, int):
            characters += 1 + inner.bit_length() // 3
        elif isinstance(inner, Namespace):  # its text is that of all its values
            pending.append(object.__getattribute__(inner, "_Namespace__attrs"))
        else:
            characters += _OTHER + (len(inner.name) if isinstance(inner, Macro) else 0)
        if count + len(pending) > MAX_ITEMS:
            raise HostileTemplateError("the chat template creates too long a list")
    return count, characters


def limited(count: int) -> None:
    """Raises HostileTemplateError for a list that would have too many items."""
    if count > MAX_ITEMS:
        raise HostileTemplateError("the chat template creates too long a list")
