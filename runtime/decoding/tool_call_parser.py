"""Reads the tool calls of an answer while they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import uuid4

from dlp_edge.runtime.text.tools import CallFormat
from dlp_edge.types import ToolCall, ToolCallPiece

# A string runs on if it ends in REPEATS times the same, of at most LONGEST_UNIT characters, and at
# least SHORTEST_LOOP in all: a line of dashes is shorter.
REPEATS = 3
LONGEST_UNIT = 200
SHORTEST_LOOP = 100
_HEAD = re.compile(r'\{"name": "([^"\\]+)", "\w+": ')  # up to the arguments


class ToolCallParser:
    """Takes the calls out of an answer that follows the grammar of `AnswerTools`.

    Attributes:
        begun: whether a call has begun, after which there is no other text.
        calls: those that are complete.
        repeated: whether the model made a call that it had made before; that one is not told.

    Args:
        stop_repetition: whether to find what is written again and again.
    """

    def __init__(self, form: CallFormat, stop_repetition: bool = True) -> None:
        self.begun = False
        self.calls: list[ToolCall] = []
        self.repeated = False
        self._stop_repetition = stop_repetition
        self._told = 0  # characters of the open call's arguments, of which pieces were given out
        self._named = False  # whether its name was
        self._tag = form.begin.rstrip()
        parts = (re.escape(self._tag[:length]) for length in range(len(self._tag) - 1, 0, -1))
        # White space before a call is not part of what is said.
        self._may_begin = re.compile(rf"\s*(?:{'|'.join(parts)})?\Z")
        self._held = ""  # text that may be the start of a call, or of a call's arguments
        self._said = False  # whether the answer began with text
        self._open: tuple[str, str] | None = None  # id and name of the call that is being written
        self._written = ""  # of its arguments
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, piece: str) -> tuple[str, list[ToolCallPiece]]:
        """The text that the piece adds to the answer, and to its calls."""
        said = ""
        if not self.begun:
            said, piece = self._find_begin(piece)
        pieces = list(self._read_calls(piece)) if self.begun else []
        return said, pieces

    def finish(self) -> str:
        """The held-back text, once generation has ended."""
        held, self._held = self._held, ""
        return "" if self.begun else held

    def _find_begin(self, piece: str) -> tuple[str, str]:
        """The text before the first call as far as it is certain, and what follows its begin."""
        text = self._held + piece
        if not self._tag:
            if self._said or not text.startswith("{"):
                self._said = self._said or bool(text)
                return text, ""
            at = 0
        else:
            at = text.find(self._tag)
        if at >= 0:
            self.begun, self._held = True, ""
            return text[:at].rstrip(), text[at + len(self._tag) :]
        found = self._may_begin.search(text)
        sure = len(text) if found is None else found.start()
        self._held = text[sure:]
        return text[:sure], ""

    def _read_calls(self, piece: str) -> Iterator[ToolCallPiece]:
        """The pieces of calls in newly generated text."""
        text, self._held = self._held + piece, ""
        while text:
            if self._open is None:
                head = _HEAD.search(text)
                if head is None:
                    self._held = text
                    return
                self._open = (f"call_{uuid4().hex[:24]}", head[1])
                self._written, self._told, self._named = "", 0, False
                text = text[head.end() :]
            end = self._end_of_arguments(text)
            self._written += text[:end]
            text = text[end:]
            complete = self._depth == 0 and bool(self._written)
            known = self._may_be_known(self._open[1])
            if known and complete:
                self.repeated = True
                return
            if not known:
                yield from self._tell(*self._open)
            if complete:
                self.calls.append(ToolCall(*self._open, self._written))
                self._open = None

    def _may_be_known(self, name: str) -> bool:
        """Whether the open call is, so far, one that was made before."""
        return self._stop_repetition and any(
            call.name == name and call.arguments_text.startswith(self._written)
            for call in self.calls
        )

    def _tell(self, id_: str, name: str) -> Iterator[ToolCallPiece]:
        """What has not been given out of the open call."""
        index, rest = len(self.calls), self._written[self._told :]
        if not self._named:
            yield ToolCallPiece(index, id_, name, "")
        if rest:
            yield ToolCallPiece(index, id_, name, rest)
        self._named, self._told = True, len(self._written)

    @property
    def runs_on(self) -> bool:
        """Whether a string repeats its end over and over."""
        if not (self._stop_repetition and self._in_string) or self._escaped:
            return False
        for period in range(1, LONGEST_UNIT + 1):
            times = max(REPEATS, -(-SHORTEST_LOOP // period))
            if self._written[-1:] != self._written[-period - 1 : -period]:
                continue
            end = self._written[-period * times :]
            if len(end) == period * times and end == end[:period] * times:
                return True
        return False

    def _end_of_arguments(self, text: str) -> int:
        """How many characters of a text belong to the arguments of the open call."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return len(text)
