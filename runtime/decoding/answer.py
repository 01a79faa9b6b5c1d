"""The state of one answer: samples tokens, finds its sentences, asks who writes them.

Knows no backbone: `loop.py` brings it logits and fuses what it asks for.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.errors import NonFiniteError
from dlp_edge.runtime.decoding.json_constraint import grammar_tokenizer
from dlp_edge.runtime.decoding.prompt_lookup import PromptLookup
from dlp_edge.runtime.decoding.sampling import (
    make_sampler,
    penalise,
)
from dlp_edge.runtime.decoding.token_report import TokenReport
from dlp_edge.runtime.decoding.tool_calls import AnswerTools, constrain
from dlp_edge.runtime.request import Decoding, seed_of
from dlp_edge.runtime.routing.policy import RoutingPolicy, SentenceFusion
from dlp_edge.runtime.text.detokenizer import Detokenizer, StopMatcher
from dlp_edge.runtime.text.repetition import RepetitionDetector
from dlp_edge.runtime.text.sentences import SentenceSplitter
from dlp_edge.types import (
    Chunk,
    FinishReason,
    Reply,
    RouteDecision,
    Sentence,
    Timings,
    Usage,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer


_log = logging.getLogger(__name__)


class Vocabulary:
    """The backbone's tokenizer, the number of its logits, and the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.eos_token_ids = eos_token_ids

    @cached_property
    def for_grammars(self) -> LLTokenizer:
        """Made when the first answer asks for it."""
        return grammar_tokenizer(self.tokenizer, self.size, self.eos_token_ids)


@dataclass(frozen=True)
class _SentenceStart:
    """Where a sentence starts in the answer, and what writes it."""

    offset: int
    written_by: SentenceFusion


@dataclass(frozen=True)
class Step:
    """What a token did to an answer.

    Attributes:
        chunks: the text that it completed, a chunk per sentence.
        fusion: the adapters that write from the next pass on, where that is a change.
        as_drafted: whether the pass goes on with the next drafted token: this was the one drafted,
            and the fusion stays.
    """

    chunks: list[Chunk]
    fusion: dict[str, float] | None = None
    as_drafted: bool = False


class Answer:
    """The state of one answer.

    Args:
        prompt_ids: the whole prompt, template included.
        user_text: what the router reads of it.
        room: tokens that the cache holds, prompt and answer together.
        tools: those that the model may call.

    Attributes:
        tokens: the answer's, the newest last.
        limit: the most tokens that the answer may have.
        requested_at: when it was asked for, which the time to the first token counts from; 0 until
            it begins, if nobody sets it.
        done: whether the answer is complete.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        user_text: str,
        decoding: Decoding,
        policy: RoutingPolicy,
        room: int,
        tools: AnswerTools | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.room = room
        self.kv = decoding.kv
        self.requested_at = 0.0
        self.tokens: list[int] = []
        self.done = False
        self.timings = Timings()
        self._user_text = user_text
        self._policy = policy
        self._ends = vocabulary.eos_token_ids | decoding.stop_tokens
        # The newest token needs no room: it is in no cache until the next pass.
        self.limit = min(decoding.max_new_tokens, room - len(prompt_ids) + 1)
        self._decoding = decoding
        self._seed = seed_of(decoding)
        self._sampler = make_sampler(
            decoding.temperature, decoding.top_p, decoding.top_k, self._seed, decoding.min_p
        )
        self._seen = np.zeros(vocabulary.size, np.bool_)
        self._seen[list(prompt_ids)] = True
        self._calls, self._constraint = constrain(decoding, tools, lambda: vocabulary.for_grammars)
        self._report = TokenReport(vocabulary.tokenizer)
        self._detokenizer = Detokenizer(vocabulary.tokenizer)
        self._splitter = SentenceSplitter()
        self._stops = StopMatcher(decoding.stop)
        # JSON under a schema ends by itself, and may hold equal items.
        watched = decoding.repetition_stop and decoding.json_schema is None
        self._repetition = RepetitionDetector() if watched else None
        self._generated = ""  # all text, also what is held back for stop strings
        self._text = ""  # what was given out
        self._finish_reason: FinishReason = "cancelled"  # until the answer ends by itself
        self._starts: list[_SentenceStart] = []
        self._lookup = PromptLookup(prompt_ids) if decoding.speculate else None

    def begin(self) -> dict[str, float]:
        """Routes on the prompt; returns the adapters that write the first sentence."""
        started = perf_counter()
        self.requested_at = self.requested_at or started
        written_by = self._policy.at_prompt(self._user_text)
        self._record_routing(written_by, started)
        self._starts = [_SentenceStart(0, written_by)]
        return written_by.weights

    def take(self, logits: npt.NDArray[np.floating], drafted: int | None = None) -> Step:
        """Samples the next token from logits [V].

        Args:
            drafted: the token that the same pass has read already.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
        """
        started = perf_counter()
        if not np.isfinite(logits.max()):  # the largest of numbers among which is NaN is NaN
            raise NonFiniteError(
                f"the backbone's numbers are not finite after {len(self.tokens)} tokens",
                "Lower the adapters' weights, or export the bundle again",
            )
        return self._accept(self._choose(logits), drafted, started)

    def accept(self, token: int) -> Step:
        """Goes on with a token that another engine has chosen."""
        return self._accept(token, None, perf_counter())

    def end(self, reason: FinishReason) -> list[Chunk]:
        """Ends the answer as another engine has; returns the text that was held back."""
        self._end(reason)
        return self.finish()

    def _accept(self, token: int, drafted: int | None, started: float) -> Step:
        if not self.tokens:
            self.record(first_token=perf_counter() - self.requested_at)
        if token in self._ends:
            self._end("stop")
            return Step(self.finish())
        self.tokens.append(token)
        piece = self._detokenizer.step(token)
        before = len(self._generated)
        self._generated += piece
        fusion = None
        if self._calls is None or not self._calls.begun:  # a call is written under one fusion
            starts = self._splitter.feed(piece)
            loop_end = self._repetition.feed(self._generated, starts) if self._repetition else None
            if loop_end is not None:
                return Step(self._end_loop(piece[: loop_end - before]))
            fusion = self._enter_sentences(starts)
        chunks = self._read(piece)
        self.record(decode=perf_counter() - started)
        if self._stops.matched or (self._calls is not None and self._calls.repeated):
            self._end("stop")
        elif len(self.tokens) >= self.limit:
            self._end("length")
            chunks += self.finish()
        return Step(chunks, fusion, not self.done and fusion is None and token == drafted)

    def draft(self, most: int) -> list[int]:
        """Tokens that may follow the newest one, fewer than `most`; none where they are not
        likely enough, or near the end of the context."""
        if self._lookup is None or len(self.prompt_ids) + len(self.tokens) - 1 + most > self.room:
            return []
        return self._lookup.propose(self.tokens, min(most, self.limit - len(self.tokens)) - 1)

    def finish(self) -> list[Chunk]:
        """The text that was held back, once no token follows."""
        chunks = self._read(self._detokenizer.finish())
        held = "" if self._calls is None else self._calls.finish()
        return chunks + self._emit(self._stops.feed(held) + self._stops.finish())

    def reply(self) -> Reply:
        """The answer so far."""
        edges = [start.offset for start in self._starts] + [len(self._text)]
        sentences = tuple(
            Sentence(
                self._text[start.offset : end],
                dict(start.written_by.weights),
                start.written_by.confidence,
            )
            for start, end in zip(self._starts, edges[1:], strict=True)
            if start.offset < len(self._text)
        )
        usage = Usage(len(self.prompt_ids), len(self.tokens), self.timings.reused)
        tokens = tuple(self._report.tokens)
        calls = () if self._calls is None else tuple(self._calls.calls)
        called, seed = calls and self._finish_reason == "stop", self._seed
        reason: FinishReason = "tool_calls" if called else self._finish_reason
        return Reply(self._text, sentences, usage, self.timings, reason, tokens, seed, (), calls)

    @property
    def first_decision(self) -> RouteDecision | None:
        """The router's for the prompt; None where it was not asked, or not yet."""
        return self._starts[0].written_by.decision if self._starts else None

    @property
    def fusion(self) -> dict[str, float]:
        """The adapters that write the newest sentence."""
        return self._starts[-1].written_by.weights

    def record(self, **amounts: float) -> None:
        """Adds seconds and counts to the timings."""
        now = {key: getattr(self.timings, key) + amount for key, amount in amounts.items()}
        self.timings = replace(self.timings, **now)

    def _choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next token under the request's options."""
        decoding, adjusted = self._decoding, logits
        if decoding.repetition_penalty != 1:
            adjusted = penalise(adjusted, self._seen, decoding.repetition_penalty)
        if self._constraint:
            adjusted = self._constraint.allow(adjusted)
        token = self._sampler(adjusted)
        self._seen[token] = True
        if self._constraint:
            self._constraint.accept(token)
        if decoding.logprobs is not None and token not in self._ends:
            self._report.add(token, logits, decoding.logprobs)
        return token

    def _end(self, reason: FinishReason) -> None:
        self.done = True
        self._finish_reason = reason
        _log.debug("answered: %d tokens, %s", len(self.tokens), reason)

    def _end_loop(self, text: str) -> list[Chunk]:
        """The last chunks of an answer that repeats itself; `text` is the newest token's part."""
        chunks = self._emit(self._stops.feed(text))
        if not self._stops.matched:
            chunks += self._emit(self._stops.finish())
        self._end("stop" if self._stops.matched else "repetition")
        return chunks

    def _enter_sentences(self, offsets: list[int]) -> dict[str, float] | None:
        """At the first token of a sentence: routes on all text so far. Returns the new fusion,
        where it changed.

        Of several starts inside one token only the last is routed: no further token is generated
        for the others.
        """
        if not offsets:
            return None
        before = self._starts[-1].written_by
        started = perf_counter()
        written_by = self._policy.at_sentence(self._user_text, self._generated, before)
        if written_by is not before:
            self._record_routing(written_by, started)
        self._starts += [_SentenceStart(offset, before) for offset in offsets[:-1]]
        self._starts.append(_SentenceStart(offsets[-1], written_by))
        if written_by.weights == before.weights:
            return None
        self.record(switches=1)
        return written_by.weights

    def _record_routing(self, written_by: SentenceFusion, started: float) -> None:
        _log.debug("from character %d: %s", len(self._generated), written_by.weights or "base")
        if written_by.decision is not None:
            self.record(router=perf_counter() - started, routings=1)

    def _read(self, piece: str) -> list[Chunk]:
        """The chunks of newly generated text: of what the model says, and of its calls."""
        if self._calls is None:
            return self._emit(self._stops.feed(piece))
        said, pieces = self._calls.feed(piece)
        chunks = self._emit(self._stops.feed(said))
        if pieces and not self._stops.matched:
            chunks += self._emit(self._stops.finish())
            at, fusion = len(self._starts) - 1, self._starts[-1].written_by.weights
            for call in pieces:
                chunks.append(Chunk("", at, dict(fusion), self._report.untold(), tool_call=call))
        return chunks

    def _emit(self, text: str) -> list[Chunk]:
        """Adds text to the answer, as one chunk per sentence."""
        return list(self._chunks(text))

    def _chunks(self, text: str) -> Iterator[Chunk]:
        start, end = len(self._text), len(self._text) + len(text)
        self._text += text
        # Answers may have thousands of sentences, of which a text lies in the last ones.
        first = bisect_right(self._starts, start, key=lambda at: at.offset) - 1
        cuts = [at.offset for at in self._starts[first + 1 :] if at.offset < end]
        sentences = zip([start, *cuts], [*cuts, end], strict=True)
        for index, (left, right) in enumerate(sentences, first):
            if left < right:
                fusion = dict(self._starts[index].written_by.weights)  # a copy for the consumer
                yield Chunk(self._text[left:right], index, fusion, self._report.untold())
