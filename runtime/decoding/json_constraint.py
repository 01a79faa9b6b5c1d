"""Answers that follow a JSON schema or a grammar, by masking the tokens that would break it.

On llguidance (https://github.com/guidance-ai/llguidance), which is the extra `json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.errors import BundleError, UsageError
from dlp_edge.runtime.options import Schema

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_REPEATS = 20_000  # the product of a pattern's counts; a step takes 10 ms at 90,000
_COUNT = re.compile(r"(\d{1,9}),?\}")  # the larger of two, or the only one

# White space between values would let a small model write line breaks until its tokens are spent.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos: frozenset[int]) -> LLTokenizer:
    """What a constraint needs to know of the tokenizer; takes a fraction of a second.

    Raises:
        UsageError: llguidance is not installed.
        BundleError: it cannot work with this tokenizer.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise UsageError(
            "json_schema and tools need the package llguidance", "Install dlp-edge[json]"
        ) from error
    try:
        return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(eos))
    except ValueError as error:  # an end token that the tokenizer does not know, for one
        raise BundleError(
            f"the bundle's tokenizer cannot keep to a JSON schema ({str(error)[:200]})",
            "Ask without json_schema or tools, or export it with a tokenizer that has its tokens",
        ) from error


class Constraint:
    """The state of one answer that follows a grammar.

    Args:
        write: makes the grammar, in llguidance's form.
        subject: what the caller gave that it is made of, for errors.

    Raises:
        UsageError: it is no grammar, or uses what llguidance does not know.
    """

    def __init__(self, tokenizer: LLTokenizer, write: Callable[[], str], subject: str) -> None:
        from llguidance import LLMatcher
        from llguidance.numpy import allocate_token_bitmask

        self._subject = subject
        try:
            self._matcher = LLMatcher(tokenizer, write())
            problem = self._matcher.get_error() if self._matcher.is_error() else ""
        except (TypeError, ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise self._unusable(problem)
        self._mask = allocate_token_bitmask(1, tokenizer.vocab_size)

    def allow(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """The logits [V] with -inf for every token that may not follow."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        allowed = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little").view(np.bool_)
        masked = np.full_like(logits, -np.inf)
        np.copyto(masked, logits, where=allowed[: len(logits)])
        return masked

    def accept(self, token: int) -> None:
        """Goes on with the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        """Raises UsageError once the schema needs too much work: nothing is enforced then."""
        if self._matcher.is_error():
            raise self._unusable(self._matcher.get_error())

    def _unusable(self, problem: str) -> UsageError:
        first = (problem.splitlines() or [""])[0][:300]
        return UsageError(
            f"{self._subject} is no schema that can be followed ({first})",
            "Check it, or leave out what is not supported",
        )


def json_constraint(tokenizer: LLTokenizer, schema: Schema) -> Constraint:
    """The state of one answer's JSON.

    Raises:
        UsageError: the schema is none, or uses what llguidance does not know.
    """

    def write() -> str:
        return json.dumps({"grammars": [{"json_schema": compact_schema(schema)}]})

    return Constraint(tokenizer, write, "json_schema")


def compact_schema(schema: Schema) -> dict[str, Any]:
    """A schema as a document that asks for compact JSON.

    Raises:
        TypeError, ValueError, RecursionError: it is none.
    """
    of_pydantic = getattr(schema, "model_json_schema", None)
    document = of_pydantic() if callable(of_pydantic) else schema
    text = document if isinstance(document, str) else json.dumps(document)
    parsed = json.loads(text)
    _check_patterns(parsed)
    if not isinstance(parsed, dict):
        raise ValueError("it is no object")
    return {**parsed, "x-guidance": _COMPACT}


def _check_patterns(schema: Any) -> None:
    """Raises ValueError for a pattern whose counts, nested, repeat something too often."""
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            patterns = [value.get("pattern"), *(value.get("patternProperties") or ())]
            for pattern in patterns:
                counts = _COUNT.findall(pattern) if isinstance(pattern, str) else ()
                if math.prod(max(1, int(count)) for count in counts) > MAX_REPEATS:
                    raise ValueError(f"the pattern {pattern[:100]!r} repeats too often")
