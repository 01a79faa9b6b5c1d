"""Tool calls in an answer: the grammar that they follow, and how they are read as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from dlp_edge.runtime.decoding.json_constraint import (
    Constraint,
    compact_schema,
    json_constraint,
)
from dlp_edge.runtime.options import Schema
from dlp_edge.runtime.text.tools import CallFormat, ToolUse
from dlp_edge.types import ToolCall, ToolCallPiece

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CALLS = 16  # of an answer: a small model may go on for ever
_HEAD = re.compile(r'\{"name": "([^"\\]+)", "\w+": ')  # up to the arguments


@dataclass(frozen=True)
class AnswerTools:
    """The tools that an answer may call, and how it writes a call."""

    use: ToolUse
    form: CallFormat

    def constraint(self, tokenizer: LLTokenizer, schema: Schema | None) -> Constraint:
        """The state of one answer: calls that follow the tools' schemas or, where none is
        required, a text, which follows `schema` if there is one.

        Raises:
            UsageError: a schema is none, or uses what llguidance does not know.
        """
        subject = "a tool's parameters" if schema is None else "json_schema or a tool's parameters"
        return Constraint(tokenizer, lambda: self._grammar(schema), subject)

    def _grammar(self, schema: Schema | None) -> str:
        form, use = self.form, self.use
        tag = form.begin.rstrip()  # after which no other text follows
        several = ""
        if use.parallel and form.between is not None:
            several = f"({_quoted(form.between)} call){{0,{MAX_CALLS - 1}}}"
        rules = [
            "%llguidance {}",
            f"calls: open {_quoted(form.begin[len(tag) :])} call {several} {_quoted(form.end)}",
            "call: " + " | ".join(f"call_{index}" for index in range(len(use.allowed))),
        ]
        for index, tool in enumerate(use.allowed):
            head, tail = form.write(tool.name, "\0").split("\0")
            arguments = f"%json {json.dumps(compact_schema(tool.parameters))}"
            rules.append(f"call_{index}: {_quoted(head)} {arguments} {_quoted(tail)}")
        if use.required or schema is not None:
            rules.append(f"open: {_quoted(tag)}")
        elif tag:
            rules.append(f"open[lazy]: TEXT {_quoted(tag)}")
        else:  # only the first character tells a call from a text
            rules.append('open: ""')
        if use.required:
            rules.append("start: calls")
        elif schema is not None:
            rules.append(f"start: %json {json.dumps(compact_schema(schema))} | calls")
        else:
            rules += ["start: TEXT | calls", f"TEXT: /{_ANY if tag else _NO_BRACE}/"]
        return "\n".join(rules)


def constraint_of(
    schema: Schema | None, tools: AnswerTools | None, tokenizer: Callable[[], LLTokenizer]
) -> Constraint | None:
    """What an answer has to follow; None if nothing.

    Raises:
        UsageError: a schema is none, or llguidance is not installed.
    """
    if tools is not None:
        return tools.constraint(tokenizer(), schema)
    return None if schema is None else json_constraint(tokenizer(), schema)


_ANY = r"(.|\n)*"
_NO_BRACE = r"([^{ \n](.|\n)*)?"


def _quoted(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False) if text else '""'


class ToolCallParser:
    """Takes the calls out of an answer that follows the grammar of `AnswerTools`.

    Attributes:
        begun: whether a call has begun, after which there is no other text.
        calls: those that are complete.
    """

    def __init__(self, form: CallFormat) -> None:
        self.begun = False
        self.calls: list[ToolCall] = []
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
                self._written = ""
                text = text[head.end() :]
                yield ToolCallPiece(len(self.calls), *self._open, "")
            end = self._end_of_arguments(text)
            if end:
                self._written += text[:end]
                yield ToolCallPiece(len(self.calls), *self._open, text[:end])
            text = text[end:]
            if self._depth == 0 and self._written:
                self.calls.append(ToolCall(*self._open, self._written))
                self._open = None

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
