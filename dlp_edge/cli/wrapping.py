"""Wraps streamed text at words, behind a hanging indent."""

from __future__ import annotations

import math
from collections.abc import Callable
from unicodedata import category, east_asian_width

LEAST_ROOM = 8  # columns; a narrower terminal breaks the lines itself
TAB = "    "


class Wrapper:
    """Writes the text of a column as it arrives; a word once it is whole.

    Args:
        write: called with what is to be shown.
        indent: begins every further line.
        room: columns of a line, without the indent; `math.inf` adds no line breaks.
    """

    def __init__(self, write: Callable[[str], None], indent: str, room: float = math.inf) -> None:
        self._write = write
        self._indent = indent
        self._room = max(LEAST_ROOM, room)
        self._used = 0  # columns of the current line
        self._gap = ""  # white space that is shown once something follows
        self._word = ""

    def feed(self, text: str) -> None:
        """Adds text; what may continue is held back."""
        for character in text:
            if character.isspace():
                self._end_word()
                self._gap += TAB if character == "\t" else character
            elif columns(character) == 2:  # scripts without spaces break anywhere
                self._end_word()
                self._word = character
            else:
                self._word += character

    def finish(self) -> None:
        """Shows what was held back, without white space at the end."""
        self._end_word()
        self._gap = ""

    def _end_word(self) -> None:
        if not self._word:
            return
        *ended, gap = self._gap.split("\n")
        for _ in ended:
            self._break_line()
        width = columns(self._word)
        if self._used and self._used + len(gap) + width > self._room:
            self._break_line()
            gap = ""
        if width <= self._room:
            self._put(gap + self._word)
        else:
            for character in gap + self._word:
                if self._used + columns(character) > self._room:
                    self._break_line()
                self._put(character)
        self._gap = self._word = ""

    def _put(self, text: str) -> None:
        self._write(text)
        self._used += columns(text)

    def _break_line(self) -> None:
        self._write("\n" + self._indent)
        self._used = 0


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if category(c) in ("Mn", "Me", "Cf") else 2 if east_asian_width(c) in "WF" else 1
        for c in text
    )
