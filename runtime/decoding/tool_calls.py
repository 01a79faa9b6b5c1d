"""The grammar of an answer that may call tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dlp_edge.runtime.decoding.json_constraint import (
    Constraint,
    compact_schema,
    json_constraint,
)
from dlp_edge.runtime.decoding.tool_call_parser import ToolCallParser
from dlp_edge.runtime.options import Schema
from dlp_edge.runtime.request import Decoding
from dlp_edge.runtime.text.tools import CallFormat, ToolUse

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CALLS = 16  # of an answer: a small model may go on for ever


@dataclass(frozen=True)
class AnswerTools:
    """The tools that an answer may call, and how it writes a call."""

    use: ToolUse
    form: CallFormat

    def grammar(self, schema: Schema | None) -> str:
        """Calls that follow the tools' schemas or, where none is required, a text, which follows
        `schema` if there is one.

        Raises:
            TypeError, ValueError, RecursionError: a schema is none.
        """
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


class ToolConstraint(Constraint):
    """The state of one answer that may call tools.

    Args:
        calls: what has been written of them.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        tools: AnswerTools,
        schema: Schema | None,
        calls: ToolCallParser,
    ) -> None:
        subject = "a tool's parameters" if schema is None else "json_schema or a tool's parameters"
        super().__init__(tokenizer, lambda: tools.grammar(schema), subject)
        self._calls = calls
        quote: list[int] = tokenizer.tokenize_str('"')
        self._quote = quote[0] if len(quote) == 1 else None

    def allow(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """As `Constraint.allow`; a string that runs on ends here, where it may."""
        masked = super().allow(logits)
        quote = self._quote
        if quote is not None and self._calls.runs_on and masked[quote] > -np.inf:
            closed = np.full_like(masked, -np.inf)
            closed[quote] = masked[quote]
            return closed
        return masked


def constrain(
    decoding: Decoding, tools: AnswerTools | None, tokenizer: Callable[[], LLTokenizer]
) -> tuple[ToolCallParser | None, Constraint | None]:
    """What reads an answer's calls, and what the answer has to follow; None for neither.

    Raises:
        UsageError: a schema is none, or llguidance is not installed.
    """
    schema = decoding.json_schema
    if tools is not None:
        calls = ToolCallParser(tools.form, decoding.repetition_stop)
        return calls, ToolConstraint(tokenizer(), tools, schema, calls)
    return None, None if schema is None else json_constraint(tokenizer(), schema)


_ANY = r"(.|\n)*"
_NO_BRACE = r"([^{ \n](.|\n)*)?"


def _quoted(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False) if text else '""'
